"""List the runs of a visitor in the frame of all tabs, with their progress and what can be done."""
