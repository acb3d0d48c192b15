"""Model folders: read by their headers, matched matrix by matrix, checked and written."""
