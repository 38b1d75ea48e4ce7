"""The program and its parts: layouts, collectives, nodes and their types, tables, the text form, contracts."""
