"""Create merge plans: options, selection, previews, plan files and mergekit recipes."""
