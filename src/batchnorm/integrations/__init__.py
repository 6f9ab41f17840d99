"""The verbs as parts of other packages. Each module here needs the package it is named after, and says so."""
