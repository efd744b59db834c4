//! What every backend of a seam must do, as test suites that any backend can run.
