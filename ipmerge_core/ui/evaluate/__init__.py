"""The Evaluate tab: score models on tasks, sweep parameters, knock modules out."""
