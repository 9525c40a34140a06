"""What users pass as rows, as arrays: read, compared between clients, narrowed, and put side by side."""
