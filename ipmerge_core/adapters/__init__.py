"""Export low-rank updates as PEFT adapters."""
