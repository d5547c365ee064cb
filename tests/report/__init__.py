"""Tests of what a person looks at: report, served page, live view."""
