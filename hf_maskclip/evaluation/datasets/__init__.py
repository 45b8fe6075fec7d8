"""Where evaluations get their pictures from: one reader a file, and what finds the right one for a name."""
