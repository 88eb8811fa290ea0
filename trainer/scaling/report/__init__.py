"""Shows a study: the terminal page, the HTML report, static pictures."""
