"""The program and what it is made of: layouts, collectives, nodes and their types, tables, the text form, contracts."""
