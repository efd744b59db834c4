//! Errors of a store as statuses of gRPC, and back.

use tonic::{Code, Status};

use super::EPOCH_KEY;
use crate::{Epoch, StoreError};

pub(super) fn of_error(error: &StoreError) -> Status {
    match error {
        StoreError::Unavailable(cause) => Status::unavailable(cause),
        StoreError::Full(cause) => Status::resource_exhausted(cause),
        StoreError::Quota(cause) => Status::permission_denied(cause),
        StoreError::Damaged(cause) => Status::data_loss(cause),
        StoreError::Stale { current } => {
            let mut status = Status::failed_precondition(error.to_string());
            let epoch = current.0.to_string();
            let epoch = epoch.parse().expect("digits can stand in metadata");
            status.metadata_mut().insert(EPOCH_KEY, epoch);
            status
        }
    }
}

/// Whatever is not the answer of a store means that the node could not be asked.
pub(super) fn to_error(status: &Status) -> StoreError {
    let cause = status.message().to_owned();
    match status.code() {
        Code::ResourceExhausted => StoreError::Full(cause),
        Code::PermissionDenied => StoreError::Quota(cause),
        Code::DataLoss => StoreError::Damaged(cause),
        Code::FailedPrecondition => {
            let epoch = status.metadata().get(EPOCH_KEY);
            match epoch.and_then(|text| text.to_str().ok()?.parse().ok()) {
                Some(epoch) => StoreError::Stale {
                    current: Epoch(epoch),
                },
                None => StoreError::Unavailable(cause),
            }
        }
        _ => StoreError::Unavailable(cause),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_arrives_as_it_was() {
        for error in [
            StoreError::Unavailable("gone".into()),
            StoreError::Full("full".into()),
            StoreError::Quota("enough".into()),
            StoreError::Damaged("torn".into()),
            StoreError::Stale {
                current: Epoch(u64::MAX),
            },
        ] {
            let back = to_error(&of_error(&error));
            assert_eq!(back.to_string(), error.to_string());
        }
        let unknown = to_error(&Status::unimplemented("what?"));
        assert!(matches!(unknown, StoreError::Unavailable(_)));
    }
}
