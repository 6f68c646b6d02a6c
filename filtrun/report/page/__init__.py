"""The report page: what records hold, gathered as JSON, with the styles and scripts that show it in one HTML file."""
