"""Fine-tune an MLLM with a reasoning prior in its gradient (DRIFT): prior, rules, training."""
