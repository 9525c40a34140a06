"""What runs leave in a folder, and its tables and figures."""
