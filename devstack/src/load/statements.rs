//! The statements of LOMS by name, so that what PostgreSQL says of a text can be said of the function that holds it.

use std::{path::Path, sync::LazyLock};

use anyhow::{Context as _, Result, ensure};
use regex::Regex;

/// Runs before the service does, and has its own tests on grown tables: no load comes by it.
const BEFORE_THE_SERVICE: &str = "import.rs";

/// Every statement of `loms/src/store` that the service runs, in the order of its files.
pub(super) struct Catalogue(Vec<Statement>);

struct Statement {
    /// File and function; the second statement of a function has a number.
    name: String,
    text: String,
    shape: String,
}

/// The head of a function, or a checked query with its text as a raw or a plain literal.
static QUERIES: LazyLock<Regex> = LazyLock::new(|| {
    pattern(r###"(?s)\bfn (\w+)|sqlx::query(?:_scalar)?!\(\s*(?:r#"(.*?)"#|"(.*?)")"###)
});

/// What `pg_stat_statements` writes as a parameter, and parameters.
static CONSTANTS: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"'[^']*'|\$\d+|\b\d+\b|\b(?:TRUE|FALSE|NULL)\b"));

/// A pattern of this file.
#[expect(clippy::unwrap_used, reason = "the tests compile each of them")]
fn pattern(text: &str) -> Regex {
    Regex::new(text).unwrap()
}

impl Catalogue {
    /// Reads the sources that devstack was built beside.
    pub(super) fn read() -> Result<Catalogue> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../loms/src/store");
        let mut files = std::fs::read_dir(&folder)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .with_context(|| format!("read {}", folder.display()))?;
        files.retain(|file| file.file_name() != BEFORE_THE_SERVICE);
        files.sort_by_key(std::fs::DirEntry::file_name);
        let mut statements = Vec::new();
        for file in files {
            let source = std::fs::read_to_string(file.path())?;
            let module = file.path().file_stem().map(|stem| stem.to_owned());
            let module = module.unwrap_or_default();
            read_source(&module.to_string_lossy(), &source, &mut statements);
        }
        ensure!(
            !statements.is_empty(),
            "no statement in {}",
            folder.display()
        );
        Ok(Catalogue(statements))
    }

    /// The names of all.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|statement| statement.name.as_str())
    }

    /// The statement whose text this is.
    pub(super) fn named(&self, text: &str) -> Option<&str> {
        let found = self.0.iter().find(|statement| statement.text == text);
        found.map(|statement| statement.name.as_str())
    }

    /// The statements, mostly one, whose text this is but for its constants.
    pub(super) fn named_without_constants(&self, text: &str) -> Option<String> {
        let shape = shape(text);
        let found = self.0.iter().filter(|statement| statement.shape == shape);
        let names: Vec<_> = found.map(|statement| statement.name.as_str()).collect();
        (!names.is_empty()).then(|| names.join(" or "))
    }
}

fn read_source(module: &str, source: &str, statements: &mut Vec<Statement>) {
    let (mut function, mut number) = ("", 0);
    for found in QUERIES.captures_iter(source) {
        if let Some(name) = found.get(1) {
            (function, number) = (name.as_str(), 0);
        }
        let Some(text) = found.get(2).or(found.get(3)) else {
            continue;
        };
        number += 1;
        let name = match number {
            1 => format!("{module}::{function}"),
            _ => format!("{module}::{function}, {number}"),
        };
        statements.push(Statement {
            name,
            shape: shape(text.as_str()),
            text: text.as_str().to_owned(),
        });
    }
}

fn shape(text: &str) -> String {
    CONSTANTS.replace_all(text, "?").into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_are_named_by_file_and_function() {
        let source = r##"
            async fn one() { sqlx::query!("SELECT 1 FROM a WHERE b = 'x'") }
            async fn none() {}
            async fn two() {
                sqlx::query_scalar!(
                    r#"SELECT "id" FROM c WHERE d = $1"#,
                    id
                );
                sqlx::query!(r#"DELETE FROM c"#);
            }
        "##;
        let mut statements = Vec::new();
        read_source("stock", source, &mut statements);
        let catalogue = Catalogue(statements);
        let names: Vec<_> = catalogue.names().collect();
        assert_eq!(names, ["stock::one", "stock::two", "stock::two, 2"]);
        let plain = catalogue.named(r#"SELECT "id" FROM c WHERE d = $1"#);
        assert_eq!(plain, Some("stock::two"));
        let said = catalogue.named_without_constants("SELECT $1 FROM a WHERE b = $2");
        assert_eq!(said.as_deref(), Some("stock::one"));
        assert_eq!(catalogue.named("SELECT 2"), None);
    }

    #[test]
    fn the_statements_of_the_store_are_told_apart() {
        let catalogue = Catalogue::read().unwrap();
        for statement in &catalogue.0 {
            let named = catalogue.named(&statement.text);
            assert_eq!(named, Some(statement.name.as_str()));
            let said = catalogue.named_without_constants(&statement.text);
            // settings differ in nothing but what is set
            let both = "audit::allow_long_statements or orders::wait_at_most";
            assert!(
                said.as_deref() == named || said.as_deref() == Some(both),
                "{said:?}"
            );
        }
    }
}
