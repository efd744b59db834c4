//! Which keys there are: what a file or the environment says is held against the defaults.

use std::path::PathBuf;

use moorline_access_node::ListenerConfig;
use toml::{Table, Value};

use super::Config;

/// Variables that are no configuration key.
const OTHER_VARIABLES: [&str; 6] = [
    "MOORLINE_API_KEY",
    "MOORLINE_CONFIG",
    "MOORLINE_DATA_DIR",
    "MOORLINE_MQTT_LISTEN",
    "MOORLINE_WS_LISTEN",
    "MOORLINE_HTTP_LISTEN",
];
/// Variables of the project's own tests.
const TEST_PREFIXES: [&str; 2] = ["MOORLINE_BIN", "MOORLINE_TEST_"];

/// Every key there is, with its default; those that are left out by default are empty.
fn known() -> Table {
    let mut config = Config::default();
    config.rabbitmq.ca = Some(PathBuf::new());
    config.redis.ca_file = Some(PathBuf::new());
    Table::try_from(config).expect("the defaults can be written as TOML")
}

/// The same with one element in each list of tables.
pub(super) fn known_with_elements() -> Table {
    let mut known = known();
    let element = Table::try_from(ListenerConfig::with_every_key());
    let element = element.expect("a listener can be written as TOML");
    known.insert(
        "listeners".to_owned(),
        Value::Array(vec![Value::Table(element)]),
    );
    known
}

pub(super) fn refuse_unknown(table: &Table, known: &Table, prefix: &str) -> Result<(), String> {
    for (key, value) in table {
        match (known.get(key), value) {
            (Some(Value::Table(known)), Value::Table(inner)) => {
                refuse_unknown(inner, known, &format!("{prefix}{key}."))?;
            }
            (Some(Value::Array(known)), Value::Array(given)) => {
                let Some(Value::Table(known)) = known.first() else {
                    continue;
                };
                for (at, value) in given.iter().enumerate() {
                    if let Value::Table(inner) = value {
                        refuse_unknown(inner, known, &format!("{prefix}{key}[{at}]."))?;
                    }
                }
            }
            (Some(_), _) => {}
            (None, _) => {
                let nearest = nearest(key, known.keys().map(String::as_str));
                return Err(format!(
                    "unknown key `{prefix}{key}`{}",
                    hint(prefix, nearest)
                ));
            }
        }
    }
    Ok(())
}

fn nearest<'k>(key: &str, known: impl Iterator<Item = &'k str>) -> Option<&'k str> {
    known
        .map(|name| (strsim::jaro_winkler(key, name), name))
        .filter(|(likeness, _)| *likeness > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

fn hint(prefix: &str, nearest: Option<&str>) -> String {
    match nearest {
        Some(name) => format!(", did you mean `{prefix}{name}`?"),
        None => "; `moorline config default` lists every key".to_owned(),
    }
}

/// `MOORLINE_SECTION__KEY=value` sets `key` of `[section]`.
pub(super) fn overlay_environment(
    table: &mut Table,
    variables: impl Iterator<Item = (String, String)>,
) -> Result<(), String> {
    let mut keys = Vec::new();
    gather_keys(&known(), &mut Vec::new(), &mut keys);
    for (name, text) in variables {
        let foreign = !name.starts_with("MOORLINE_")
            || OTHER_VARIABLES.contains(&name.as_str())
            || TEST_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
        if foreign {
            continue;
        }
        let Some((path, default)) = keys.iter().find(|(path, _)| variable_of(path) == name) else {
            let all: Vec<String> = keys.iter().map(|(path, _)| variable_of(path)).collect();
            let near = nearest(&name, all.iter().map(String::as_str));
            return Err(format!(
                "unknown environment variable `{name}`{}",
                hint("", near)
            ));
        };
        let value = value_of(&text, default).map_err(|error| format!("{name}: {error}"))?;
        put(table, path, value)?;
    }
    Ok(())
}

/// Every key that is no section, with its path and default.
fn gather_keys(table: &Table, path: &mut Vec<String>, keys: &mut Vec<(Vec<String>, Value)>) {
    for (key, value) in table {
        path.push(key.clone());
        match value {
            Value::Table(inner) => gather_keys(inner, path, keys),
            value => keys.push((path.clone(), value.clone())),
        }
        path.pop();
    }
}

fn variable_of(path: &[String]) -> String {
    format!("MOORLINE_{}", path.join("__").to_uppercase())
}

fn put(table: &mut Table, path: &[String], value: Value) -> Result<(), String> {
    let (key, sections) = path.split_last().expect("a key has at least one part");
    let mut target = table;
    for section in sections {
        let entry = target
            .entry(section.clone())
            .or_insert_with(|| Value::Table(Table::new()));
        target = entry
            .as_table_mut()
            .ok_or_else(|| format!("`{section}` must be a section"))?;
    }
    target.insert(key.clone(), value);
    Ok(())
}

/// The text of a variable as the type that its key has.
fn value_of(text: &str, default: &Value) -> Result<Value, String> {
    match default {
        Value::Integer(_) => text
            .parse()
            .map(Value::Integer)
            .map_err(|_| format!("{text:?} is not a whole number")),
        Value::Boolean(_) => text
            .parse()
            .map(Value::Boolean)
            .map_err(|_| format!("{text:?} is not true or false")),
        Value::Array(_) => Err("lists can only be set in the file".to_owned()),
        _ => Ok(Value::String(text.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn overlaid(name: &str, value: &str) -> Result<Table, String> {
        let mut table = Table::new();
        overlay_environment(
            &mut table,
            [(name.to_owned(), value.to_owned())].into_iter(),
        )?;
        Ok(table)
    }

    #[test]
    fn the_environment_sets_keys_of_their_type() {
        let table = overlaid("MOORLINE_MQTT__RECEIVE_MAXIMUM", "7").unwrap();
        assert_eq!(table["mqtt"]["receive_maximum"], Value::Integer(7));
        let table = overlaid("MOORLINE_LISTEN__HTTP", "127.0.0.1:1").unwrap();
        assert_eq!(table["listen"]["http"], Value::String("127.0.0.1:1".into()));
        assert_eq!(overlaid("PATH", "x").unwrap(), Table::new());
    }

    #[test]
    fn mistakes_are_named_with_what_would_be_right() {
        let error = overlaid("MOORLINE_MQTT__RECIEVE_MAXIMUM", "7").unwrap_err();
        assert!(error.contains("MOORLINE_MQTT__RECEIVE_MAXIMUM"), "{error}");
        let error = overlaid("MOORLINE_MQTT__RECEIVE_MAXIMUM", "many").unwrap_err();
        assert_eq!(
            error,
            "MOORLINE_MQTT__RECEIVE_MAXIMUM: \"many\" is not a whole number"
        );
        let table: Table = "[mqtt]\nack_timeuot = 3".parse().unwrap();
        let error = refuse_unknown(&table, &known(), "").unwrap_err();
        assert_eq!(
            error,
            "unknown key `mqtt.ack_timeuot`, did you mean `mqtt.ack_timeout`?"
        );
    }

    #[test]
    fn a_listener_is_checked_like_a_section() {
        let table: Table = "[[listeners]]\nname = 'a'\n[[listeners]]\nadress = 'b'"
            .parse()
            .unwrap();
        let error = refuse_unknown(&table, &known_with_elements(), "").unwrap_err();
        assert_eq!(
            error,
            "unknown key `listeners[1].adress`, did you mean `listeners[1].address`?"
        );
        let table: Table = "[[listeners]]\ntls = { certifcate = 'b' }".parse().unwrap();
        let error = refuse_unknown(&table, &known_with_elements(), "").unwrap_err();
        assert!(
            error.ends_with("did you mean `listeners[0].tls.certificate`?"),
            "{error}"
        );
    }

    #[test]
    fn keys_that_are_left_out_by_default_are_known() {
        let table: Table = "redis = { ca_file = 'a' }\nrabbitmq = { ca = 'b' }"
            .parse()
            .unwrap();
        assert_eq!(refuse_unknown(&table, &known(), ""), Ok(()));
        let table = overlaid("MOORLINE_RABBITMQ__CA", "x").unwrap();
        assert_eq!(table["rabbitmq"]["ca"], Value::String("x".into()));
        let table: Table = "[cluster.drain]\nrat = 3".parse().unwrap();
        let error = refuse_unknown(&table, &known(), "").unwrap_err();
        assert_eq!(
            error,
            "unknown key `cluster.drain.rat`, did you mean `cluster.drain.rate`?"
        );
    }
}
