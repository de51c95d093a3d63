"""What several test files share; tests/README.md says what each module is for."""
