"""Studies: measurements that answer a question, as JSON, tables and a plot."""
