//! Registrations under event names that lead nowhere: whoever made one died before the job was written, or was told that it was not
//! needed and died then. They do no harm but take room, so a sweep looks at some of them each time.

use super::job_answer::{Named, Told};
use super::job_calls::shard_of;
use super::job_creation::token_made_ms;
use super::jobs::RedisJobs;
use super::reply::parse;
use crate::{EventName, StoreError, unix_ms};

/// Registrations that one sweep looks at.
const LOOKED_AT: usize = 16;

/// How old a registration is before anybody asks for its job: nobody writes one so late.
const AGE_MS: u64 = 3_600_000;

/// Whether whoever made a registration has written the job by now, if ever.
pub(super) fn is_settled(named: &Named) -> bool {
    let made_ms = token_made_ms(&named.token);
    made_ms.is_none_or(|made_ms| made_ms.saturating_add(AGE_MS) < unix_ms())
}

impl RedisJobs {
    /// Looks at the next registrations of a shard, and takes away those without a job.
    pub(super) async fn tidy_names(&self, shard: u16) -> Result<(), StoreError> {
        let place = &self.tidied[usize::from(shard) % self.tidied.len()];
        let after = place.lock().clone();
        let names = self.calls.names(shard, &after, LOOKED_AT);
        let members: Vec<String> = parse(self.link.read(names).await?)?;
        // At the end it begins again.
        *place.lock() = members.last().cloned().unwrap_or_default();
        let mut old = Vec::new();
        for member in &members {
            let damaged = || StoreError::Damaged("an impossible registration".into());
            let (name, named) = member.split_once('\0').ok_or_else(damaged)?;
            let name = EventName::parse(name).map_err(|_| damaged())?;
            old.push((name, Named::parse(named)?));
        }
        old.retain(|(_, named)| is_settled(named));
        let owners = old.iter().map(|(_, named)| {
            let id = named.id.as_str();
            self.calls.get(shard_of(id), &[id])
        });
        let owners = self.link.read_all(owners.collect()).await;
        for ((name, named), owner) in old.iter().zip(owners) {
            let owner = Told::parse_all(owner?)?.pop();
            if owner.is_none_or(|owner| owner.token != named.token) {
                self.write(&named.id, self.calls.unname(name, named))
                    .await?;
            }
        }
        Ok(())
    }
}
