"""JavaScript that the page's components share, and what joins modules into one script."""
