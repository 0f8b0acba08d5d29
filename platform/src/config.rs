//! Configuration: YAML, then `${NAME}` and `${NAME:-default}` in scalars from the environment, then the typed sections
//! (`sections`) that every service shares. The only place that reads the environment.

use std::{fs, path::Path};

use secrecy::SecretString;
use serde::{Deserialize, Deserializer, de::DeserializeOwned, de::Error as _};
use serde_path_to_error::Segment;
use serde_yaml::Value;

use crate::error::StartError;
pub use crate::sections::*;

/// Reads `file`, or `./config.yaml`. The YAML is parsed first, so that a secret cannot break its syntax; a scalar that
/// held a `${..}` is then typed again, so that a port or a switch may come from the environment.
pub fn load<T: DeserializeOwned>(file: Option<&Path>) -> Result<T, StartError> {
    let path = file.unwrap_or(Path::new("config.yaml"));
    let text = fs::read_to_string(path).map_err(|error| {
        StartError::new(
            format!("reading the config {}: {error}", path.display()),
            "name an existing file with --config, or copy config.example.yaml to config.yaml",
        )
    })?;
    let parsed = parse(&text, &|name| std::env::var(name).ok());
    let (config, unknown) = parsed.map_err(|error| {
        StartError::new(
            format!("config {}: {error}", path.display()),
            "correct it; config.example.yaml lists every key",
        )
    })?;
    for key in unknown {
        // the log is not there yet: it needs the config
        eprintln!(
            "config {}: {key} is no key of this service, it is ignored",
            path.display()
        );
    }
    Ok(config)
}

/// The config, and the keys of the file that nothing knows.
fn parse<T: DeserializeOwned>(
    text: &str,
    lookup: &dyn Fn(&str) -> Option<String>,
) -> Result<(T, Vec<String>), String> {
    let mut value: Value = serde_yaml::from_str(text).map_err(|error| error.to_string())?;
    if value.is_null() {
        value = Value::Mapping(serde_yaml::Mapping::default());
    }
    substitute(&mut value, lookup)?;
    let mut unknown = Vec::new();
    loop {
        // names the key that is wrong, which a deserializer of values does not
        let error = match serde_path_to_error::deserialize(value.clone()) {
            Ok(config) => return Ok((config, unknown)),
            Err(error) => error,
        };
        let key = error.path().to_string();
        let may_have_more = key
            .split_once('.')
            .is_none_or(|(section, key)| OPEN_SECTIONS.contains(&section) && !key.contains('.'));
        let is_of_others = may_have_more && is_of_others(error.inner());
        if !is_of_others || !remove(&mut value, error.path()) {
            return Err(error.to_string());
        }
        unknown.push(key);
    }
}

/// Shared sections that the system before has too. Everywhere else an unknown key is a mistake, and may be
/// one that opens what its author wanted shut.
const OPEN_SECTIONS: [&str; 2] = ["postgres", "jaeger"];

/// Words of keys that are about who is let in.
const GUARDED: [&str; 6] = ["tls", "auth", "role", "cert", "secur", "admin"];

/// Whether the error is a key that is none of ours and resembles none: the file is of a system
/// that had more of them. One that resembles ours is mistyped.
fn is_of_others(error: &serde_yaml::Error) -> bool {
    let text = error.to_string();
    let mut quoted = text.split('`').skip(1).step_by(2);
    if !text.starts_with("unknown field `") {
        return false;
    }
    let plain = |name: &str| name.replace(['_', '-'], "").to_lowercase();
    let Some(unknown) = quoted.next().map(plain) else {
        return false;
    };
    if GUARDED.iter().any(|word| unknown.contains(word)) {
        return false;
    }
    let most = (unknown.chars().count() / 4).max(1);
    !quoted.any(|ours| strsim::damerau_levenshtein(&plain(ours), &unknown) <= most)
}

/// Removes a key of a mapping in mappings. Whether it was there.
fn remove(value: &mut Value, path: &serde_path_to_error::Path) -> bool {
    let keys = path.iter().map(|segment| match segment {
        Segment::Map { key } => Some(key),
        _ => None,
    });
    let Some(keys) = keys.collect::<Option<Vec<_>>>() else {
        return false;
    };
    let Some((last, above)) = keys.split_last() else {
        return false;
    };
    let inner = above
        .iter()
        .try_fold(value, |value, key| value.get_mut(key.as_str()));
    let Some(mapping) = inner.and_then(Value::as_mapping_mut) else {
        return false;
    };
    mapping.remove(last.as_str()).is_some()
}

fn substitute(value: &mut Value, lookup: &dyn Fn(&str) -> Option<String>) -> Result<(), String> {
    match value {
        Value::String(text) if text.contains('$') => {
            let (expanded, substituted) = expand(text, lookup)?;
            *value = if substituted {
                retype(expanded)
            } else {
                Value::String(expanded)
            };
        }
        Value::Sequence(items) => {
            for item in items {
                substitute(item, lookup)?;
            }
        }
        Value::Mapping(entries) => {
            for (_, item) in entries.iter_mut() {
                substitute(item, lookup)?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// A number or a switch again, if its canonical form is the very text: `007` is a password, not a seven.
fn retype(text: String) -> Value {
    if let Ok(flag) = text.parse::<bool>() {
        return Value::Bool(flag);
    }
    match text.parse::<i64>() {
        Ok(number) if number.to_string() == text => Value::Number(number.into()),
        _ => Value::String(text),
    }
}

fn expand(text: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<(String, bool), String> {
    let (mut out, mut rest, mut substituted) = (String::with_capacity(text.len()), text, false);
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some(after) = rest.strip_prefix('{') {
            let Some(end) = after.find('}') else {
                return Err("a ${ without its }".into());
            };
            let (name, default) = match after[..end].split_once(":-") {
                Some((name, default)) => (name, Some(default)),
                None => (&after[..end], None),
            };
            // as in a shell, `:-` also replaces an empty value
            let found = lookup(name).filter(|found| default.is_none() || !found.is_empty());
            let Some(found) = found.or_else(|| default.map(str::to_owned)) else {
                return Err(format!(
                    "the environment has no {name} and ${{{name}}} has no default"
                ));
            };
            out.push_str(&found);
            substituted = true;
            rest = &after[end + 1..];
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    Ok((out, substituted))
}

/// For text that may look like a number (`serde(deserialize_with)`): a chat id, a token.
pub fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::String(text) => Ok(text),
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(flag) => Ok(flag.to_string()),
        Value::Null => Ok(String::new()),
        _ => Err(D::Error::custom("expected text")),
    }
}

/// [`text`] that is never printed.
pub fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SecretString, D::Error> {
    text(deserializer).map(SecretString::from)
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        #[serde(default)]
        port: u16,
        #[serde(default)]
        name: String,
        #[serde(default)]
        tls: TlsConfig,
        #[serde(default, rename = "jaeger")]
        _jaeger: JaegerConfig,
        #[serde(deserialize_with = "secret", default)]
        key: SecretString,
    }

    fn sample(text: &str) -> Result<Sample, String> {
        parse(text, &|name| match name {
            "PORT" => Some("50052".into()),
            "OFF" => Some("false".into()),
            "EMPTY" => Some(String::new()),
            "DIGITS" => Some("007".into()),
            "YAML" => Some("a: {b".into()),
            _ => None,
        })
        .map(|(sample, _)| sample)
    }

    #[test]
    fn keys_of_other_systems_are_told_and_mistyped_ones_refused() {
        let parsed = |text: &str| parse::<Sample>(text, &|_| None);
        let (config, unknown) =
            parsed("name: x\nworkers: 5\njaeger: {sink: [1]}\npool: {size: 3}").unwrap();
        assert_eq!(config.name, "x");
        assert_eq!(unknown, ["workers", "pool", "jaeger.sink"]);
        for mistyped in [
            "nmae: x",
            "Name: x",
            "prot: 1",
            "tls: {client-auth: none}",
            // what would leave a door open
            "tls: {verify_client: true}",
            "tls: {sink: 1}",
            "client_authentication: required",
            "jaeger: {tls: {on: true}}",
        ] {
            let error = parsed(mistyped).unwrap_err();
            assert!(error.contains("unknown field"), "{error}");
        }
    }

    #[test]
    fn a_port_may_be_text() {
        let jaeger: JaegerConfig = serde_yaml::from_str("port: \"6832\"").unwrap();
        assert_eq!(jaeger.port, 6832);
        let wrong = serde_yaml::from_str::<JaegerConfig>("port: \"x\"").unwrap_err();
        assert!(wrong.to_string().contains("expected a port"), "{wrong}");
    }

    #[test]
    fn scalars_from_the_environment_are_typed_again() {
        let config = sample("port: ${PORT}\ntls: {enabled: \"${OFF}\"}\nkey: ${DIGITS}").unwrap();
        assert_eq!(config.port, 50052);
        assert!(!config.tls.enabled);
        assert_eq!(config.key.expose_secret(), "007");
        assert_eq!(sample("key: ${PORT}").unwrap().key.expose_secret(), "50052");
    }

    #[test]
    fn defaults_dollars_and_yaml_in_a_value() {
        let name = |text: &str| sample(text).unwrap().name;
        assert_eq!(name("name: x${NONE:-y}z"), "xyz");
        assert_eq!(name("name: ${EMPTY:-y}"), "y");
        assert_eq!(name("name: a$$b$c"), "a$b$c");
        assert_eq!(name("name: \"${YAML}\""), "a: {b");
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert!(sample("name: ${NONE}").unwrap_err().contains("NONE"));
        assert!(sample("nmae: x").unwrap_err().contains("nmae"));
        assert!(sample("name: ${NONE").unwrap_err().contains("${"));
        assert!(sample("port: eighty").unwrap_err().contains("port"));
    }
}
