//! The files under `deployments/` as docker compose would read them: merged, with their variables, every name resolved.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_yaml::Value;

/// What runs the system, and what watches it.
pub(crate) const FILES: [&str; 2] = ["docker-compose.yaml", "docker-compose.logs.yaml"];

/// The services that may have replicas, and where each of them listens: gRPC, HTTP.
pub(crate) const SCALED: [(&str, u16, u16); 3] = [
    ("checkout", 50051, 8090),
    ("loms", 50052, 8081),
    ("notifications", 50053, 8082),
];

/// The repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A file of the repository.
pub(crate) fn read(path: &str) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// `NAME=value` by name.
pub(crate) fn variables(env: &str) -> BTreeMap<String, String> {
    let lines = env.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// Every `${NAME}` and `${NAME:-default}` replaced, `$$` a dollar: the rule of compose and of the services' own
/// configuration. A name that `lookup` does not know and that has no default fails the test; so it does in compose for
/// `${NAME:?}`.
pub(crate) fn expand(text: &str, lookup: &dyn Fn(&str) -> Option<String>) -> String {
    let (mut out, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        if let Some(after) = after.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some(after) = after.strip_prefix('{') {
            let (inside, after) = after.split_once('}').expect("a } after ${");
            let (name, default) = inside
                .split_once(":-")
                .map_or((inside, None), |(name, default)| (name, Some(default)));
            let name = name.split(":?").next().unwrap_or(name);
            let value = lookup(name).filter(|value| default.is_none() || !value.is_empty());
            let value = value.or_else(|| default.map(str::to_owned));
            out.push_str(&value.unwrap_or_else(|| panic!("nobody sets {name}: {text}")));
            rest = after;
        } else {
            panic!("a dollar that is neither $$ nor ${{NAME}}: {text}");
        }
    }
    out + rest
}

/// [`expand`] in every text of a document.
pub(crate) fn expand_all(value: &mut Value, lookup: &dyn Fn(&str) -> Option<String>) {
    match value {
        Value::String(text) => *text = expand(text, lookup),
        Value::Sequence(items) => items.iter_mut().for_each(|item| expand_all(item, lookup)),
        Value::Mapping(entries) => entries
            .iter_mut()
            .for_each(|(_, item)| expand_all(item, lookup)),
        _ => {}
    }
}

/// A compose file.
pub(crate) struct Compose {
    pub(crate) name: &'static str,
    pub(crate) document: Value,
}

/// A service of a compose file.
#[derive(Clone, Copy)]
pub(crate) struct Service<'a> {
    pub(crate) name: &'a str,
    pub(crate) spec: &'a Value,
}

impl Compose {
    /// With the variables of `example.env`.
    pub(crate) fn load(name: &'static str) -> Compose {
        Compose::load_with(name, &variables(&read("deployments/example.env")))
    }

    pub(crate) fn load_with(name: &'static str, variables: &BTreeMap<String, String>) -> Compose {
        let mut document: Value =
            serde_yaml::from_str(&read(&format!("deployments/{name}"))).expect("YAML");
        // an anchor that merges another one is merged by the next round
        for _ in 0..3 {
            document.apply_merge().expect("anchors that merge");
        }
        expand_all(&mut document, &|name| variables.get(name).cloned());
        Compose { name, document }
    }

    pub(crate) fn all() -> [Compose; 2] {
        FILES.map(Compose::load)
    }

    pub(crate) fn services(&self) -> Vec<Service<'_>> {
        entries(&self.document["services"])
            .into_iter()
            .map(|(name, spec)| Service { name, spec })
            .collect()
    }

    pub(crate) fn service(&self, name: &str) -> Service<'_> {
        let found = self.services().into_iter().find(|found| found.name == name);
        found.unwrap_or_else(|| panic!("{} has no {name}", self.name))
    }
}

impl<'a> Service<'a> {
    pub(crate) fn text(&self, key: &str) -> &'a str {
        self.spec[key].as_str().unwrap_or_default()
    }

    pub(crate) fn list(&self, key: &str) -> Vec<&'a str> {
        let items = self.spec[key].as_sequence().into_iter().flatten();
        items.map(|item| item.as_str().expect("a text")).collect()
    }

    pub(crate) fn environment(&self) -> BTreeMap<String, String> {
        let pairs = entries(&self.spec["environment"]).into_iter();
        pairs
            .map(|(name, value)| {
                (
                    name.to_owned(),
                    value.as_str().expect("a text, not a number").to_owned(),
                )
            })
            .collect()
    }

    /// Starts, does one thing, ends.
    pub(crate) fn runs_once(&self) -> bool {
        self.text("restart") == "no"
    }

    /// (host port, container port, protocol)
    pub(crate) fn ports(&self) -> Vec<(u16, u16, &'a str)> {
        let parse = |text: &'a str| {
            let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
            let mut parts = ports.rsplit(':');
            let mut port = || {
                parts
                    .next()
                    .and_then(|port| port.parse().ok())
                    .expect("a port")
            };
            let (inside, outside) = (port(), port());
            (outside, inside, protocol)
        };
        self.list("ports").into_iter().map(parse).collect()
    }

    /// (source, target, options)
    pub(crate) fn volumes(&self) -> Vec<(&'a str, &'a str, &'a str)> {
        let parse = |text: &'a str| {
            let mut parts = text.split(':');
            let mut part = || parts.next().unwrap_or_default();
            (part(), part(), part())
        };
        self.list("volumes").into_iter().map(parse).collect()
    }

    /// What is mounted over a folder and goes with the container.
    pub(crate) fn tmpfs(&self) -> Vec<&'a str> {
        self.list("tmpfs")
    }

    /// Whom it waits for, and for what.
    pub(crate) fn waits_for(&self) -> Vec<(&'a str, &'a str)> {
        entries(&self.spec["depends_on"])
            .into_iter()
            .map(|(name, rule)| (name, rule["condition"].as_str().expect("a condition")))
            .collect()
    }

    /// Bytes.
    pub(crate) fn memory(&self) -> u64 {
        let text = self.text("mem_limit");
        let (number, unit) = text.split_at(text.len().saturating_sub(1));
        let unit = match unit {
            "m" => 1 << 20,
            "g" => 1 << 30,
            _ => panic!("{}: mem_limit {text:?}", self.name),
        };
        number.parse::<u64>().expect("a number") * unit
    }
}

/// A mapping's entries; none of anything else.
pub(crate) fn entries(value: &Value) -> Vec<(&str, &Value)> {
    let entries = value.as_mapping().into_iter().flatten();
    entries
        .map(|(key, value)| (key.as_str().expect("a name"), value))
        .collect()
}
