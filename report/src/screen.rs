//! The boot report as one 80-column ASCII screen.
