"""Fine-tune the vision-language model of a pair with a reasoning prior, and follow its curves."""
