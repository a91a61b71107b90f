"""The tools that come with the program, and examples of how to write some: no package, but a directory of tool files."""
