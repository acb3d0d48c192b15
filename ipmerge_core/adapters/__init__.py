"""Low-rank updates instead of whole models: PEFT adapter folders."""
