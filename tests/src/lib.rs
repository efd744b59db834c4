//! What the black-box tests stand on: the gateway as a process and the world around it.
//!
//! Nothing here shares code with the product: a mistake in its codec must not be made twice. Read in
//! this order: [`gateway`] (the process), [`api`] (a backend that calls it), [`wire`] and [`device`]
//! (an MQTT client on a bare socket that does exactly what a test says), [`authority`] and
//! [`websocket`] (what a socket may be wrapped in), [`backend`] (a server that
//! the gateway calls), [`amqp`] (its queues as others see them), [`others`] (programs that others wrote),
//! [`servers`] (Redis, RabbitMQ, a network that can be cut), [`disk`], [`waiting`], [`random`].
//!
//! | variable | meaning |
//! |---|---|
//! | `MOORLINE_BIN` | the binary under test; default: `moorline` beside the test's own target folder, release before debug |
//! | `MOORLINE_TEST_SEED` | repeats one run's random choices |
//! | `MOORLINE_TEST_ROUNDS` | rounds of the tests that kill the gateway (default 10) |
//! | `MOORLINE_TEST_PYTHON` | a Python that has `tests/python/requirements.txt` |
#![allow(
    clippy::print_stderr,
    reason = "a test speaks to the person who runs it"
)]

pub mod amqp;
pub mod api;
pub mod authority;
pub mod backend;
pub mod cluster;
pub mod device;
pub mod disk;
pub mod gateway;
pub mod others;
pub mod random;
pub mod role;
pub mod servers;
pub mod waiting;
pub mod websocket;
pub mod wire;

pub use api::{Answer, Api};
pub use authority::Authority;
pub use backend::{Backend, Call};
pub use device::{Arrived, Device};
pub use gateway::{API_KEY, Ended, Gateway, Options};
pub use random::Random;
pub use waiting::{eventually, soon};
