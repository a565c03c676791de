"""`lowbit compare`: run folders in; tables, pictures, a report and a verdict out."""
