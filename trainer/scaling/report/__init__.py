"""Shows a study: in the terminal, as an HTML report, as figures for papers."""
