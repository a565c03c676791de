"""How results are left behind: aligned tables, figures, files."""
