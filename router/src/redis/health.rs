//! How Redis is, and whether it is configured as the promises need it.

use super::RedisStore;
use super::reply::parse;

/// What a process says of its Redis at start and in `/readyz`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Health {
    /// Why it cannot be used; empty when it can.
    pub reasons: Vec<String>,
    /// What weakens a promise.
    pub warnings: Vec<String>,
}

/// What one server says of itself; what it does not tell is empty.
#[derive(Debug, Default)]
struct Settings {
    append_only: String,
    append_fsync: String,
    memory_max: String,
    policy: String,
    replicas: u32,
}

impl Settings {
    fn warnings(&self, wait_replicas: u32) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.append_only == "no" {
            warnings.push("appendonly is \"no\": a restart loses everything".to_owned());
        } else if !self.append_fsync.is_empty() && self.append_fsync != "always" {
            warnings.push(format!(
                "appendfsync is {:?}: a loss of power loses what was acknowledged last",
                self.append_fsync
            ));
        }
        let is_limited = !self.memory_max.is_empty() && self.memory_max != "0";
        if is_limited && self.policy != "noeviction" {
            warnings.push(format!(
                "maxmemory-policy is {:?}: when memory is short, what was acknowledged is thrown away",
                self.policy
            ));
        }
        if self.replicas < wait_replicas {
            warnings.push(format!(
                "{} replicas are connected and redis.wait_replicas is {wait_replicas}: no write is confirmed",
                self.replicas
            ));
        } else if self.replicas > 0 && wait_replicas == 0 {
            warnings.push(
                "redis.wait_replicas is 0: a failover loses what was acknowledged last".to_owned(),
            );
        }
        warnings
    }
}

impl RedisStore {
    /// Asks every server (every master of a cluster) how it is and how it is configured.
    pub async fn health(&self) -> Health {
        let mut health = Health::default();
        if let Err(error) = self.link.find_servers().await {
            health.reasons.push(error.to_string());
        }
        let mut questions = redis::pipe();
        for name in ["appendonly", "appendfsync", "maxmemory", "maxmemory-policy"] {
            questions.cmd("CONFIG").arg("GET").arg(name);
        }
        questions.cmd("INFO").arg("replication");
        for (name, answers) in self.link.ask_each(&questions).await {
            let answers = match answers {
                Ok(answers) => answers,
                Err(error) => {
                    health.reasons.push(format!("{name}: {error}"));
                    continue;
                }
            };
            let mut answers = answers.into_iter();
            // A server that does not tell its configuration is not known to be wrong.
            let mut text = || {
                let answer = parse::<Vec<(String, String)>>(answers.next().unwrap_or_default());
                answer
                    .ok()
                    .and_then(|pairs| pairs.into_iter().next())
                    .map_or(String::new(), |(_, value)| value)
            };
            let settings = Settings {
                append_only: text(),
                append_fsync: text(),
                memory_max: text(),
                policy: text(),
                replicas: parse::<String>(answers.next().unwrap_or_default())
                    .ok()
                    .and_then(|info| {
                        info.lines()
                            .find_map(|line| line.strip_prefix("connected_slaves:"))
                            .and_then(|count| count.trim().parse().ok())
                    })
                    .unwrap_or(0),
            };
            for warning in settings.warnings(self.link.wait_replicas()) {
                health.warnings.push(format!("{name}: {warning}"));
            }
        }
        health
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(append: [&str; 2], memory: [&str; 2], replicas: u32) -> Settings {
        Settings {
            append_only: append[0].into(),
            append_fsync: append[1].into(),
            memory_max: memory[0].into(),
            policy: memory[1].into(),
            replicas,
        }
    }

    #[test]
    fn what_weakens_a_promise_is_said() {
        let right = settings(["yes", "always"], ["1000", "noeviction"], 1);
        assert!(right.warnings(1).is_empty());
        assert!(
            Settings::default().warnings(0).is_empty(),
            "nothing is known to be wrong"
        );
        for (settings, wait_replicas, word) in [
            (settings(["no", "always"], ["0", "x"], 0), 0, "appendonly"),
            (
                settings(["yes", "everysec"], ["0", "x"], 0),
                0,
                "appendfsync",
            ),
            (
                settings(["yes", "always"], ["1", "allkeys-lru"], 0),
                0,
                "maxmemory-policy",
            ),
            (
                settings(["yes", "always"], ["0", "x"], 1),
                0,
                "wait_replicas",
            ),
            (
                settings(["yes", "always"], ["0", "x"], 1),
                2,
                "wait_replicas",
            ),
        ] {
            let warnings = settings.warnings(wait_replicas);
            assert_eq!(warnings.len(), 1, "{warnings:?}");
            assert!(warnings[0].contains(word), "{warnings:?}");
        }
    }
}
