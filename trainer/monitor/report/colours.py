"""The colours that all pictures and pages share."""

INK, FAINT, TARGET, OTHER = "#1f2328", "#b4bac2", "#c2410c", "#216ea0"
SOFT, GRID = "#59636e", "#eceef0"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
# Of lines that differ by colour alone, the first ones first: Okabe and Ito's, which a
# colour-blind reader can tell apart, dark enough for lines on white.
LINES = ("#0b5cad", "#c2410c", "#00805c", "#a0478a", "#8a6d00", "#2a8fbd", "#1f2328", "#7a4b2a")
