"""What the build of these pages needs beside Sphinx."""
