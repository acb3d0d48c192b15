"""Build Plotly figures from plain numbers."""
