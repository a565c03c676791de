"""Who is told a run's rows: metrics.csv and TensorBoard, then loggers that a user names."""
