"""Problems with answers: one file per task, and how an answer is read from a text."""
