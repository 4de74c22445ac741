"""The built-in data set `sql`: questions in English about many small databases, and the SQL that answers them."""
