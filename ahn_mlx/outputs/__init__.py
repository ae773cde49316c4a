"""What commands write: files, model directories and pictures, and what they never replace."""
