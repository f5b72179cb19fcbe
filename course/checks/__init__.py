"""One module a unit; each public ``Check`` in it judges one exercise."""
