//! Scheduled jobs, fired by time or by an event.
//!
//! Nothing is here yet: the crate holds its place in the layout, and no other crate depends on it.
