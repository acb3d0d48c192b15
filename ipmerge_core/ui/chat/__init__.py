"""The Try it tab: a conversation with several models at the same time."""
