//! What answers mean.

use redis::{FromRedisValue, Value};

use crate::StoreError;

/// The answer as what it has to be.
pub(crate) fn parse<T: FromRedisValue>(value: Value) -> Result<T, StoreError> {
    redis::from_redis_value(value)
        .map_err(|error| StoreError::Damaged(format!("an answer of redis: {error}")))
}
