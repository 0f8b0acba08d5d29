//! The plan that each statement really ran with, in the process that runs it and with its own parameters: `auto_explain`
//! writes what `EXPLAIN (ANALYZE, BUFFERS)` would show into PostgreSQL's log.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use serde_json::Value;
use sqlx::PgConnection;
use tokio::time::Instant;

use super::{
    statements::Catalogue,
    statistics::{run, take_effect},
};

/// The server's log, in its folder of data.
const LOG: &str = "start.log";
/// The log is looked at this often while a statement is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(500);

const SETTINGS: [&str; 5] = [
    "ALTER SYSTEM SET auto_explain.log_analyze = on",
    "ALTER SYSTEM SET auto_explain.log_buffers = on",
    // a look at the clock for each row would cost more than most of the statements
    "ALTER SYSTEM SET auto_explain.log_timing = off",
    "ALTER SYSTEM SET auto_explain.log_format = 'json'",
    "ALTER SYSTEM SET auto_explain.log_min_duration = 0",
];
const RESETS: [&str; 5] = [
    "ALTER SYSTEM RESET auto_explain.log_analyze",
    "ALTER SYSTEM RESET auto_explain.log_buffers",
    "ALTER SYSTEM RESET auto_explain.log_timing",
    "ALTER SYSTEM RESET auto_explain.log_format",
    "ALTER SYSTEM RESET auto_explain.log_min_duration",
];

/// What one statement did, each time that it ran. Pages are of 8 KiB.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Cost {
    name: String,
    times: usize,
    mean_ms: f64,
    max_ms: f64,
    /// Rows that it returned, on average.
    rows: f64,
    pages_in_memory: f64,
    pages_read: f64,
    max_pages_read: u64,
    /// The indexes it went by, in any of its plans.
    indexes: BTreeSet<String>,
    /// The tables that it read from end to end, in any of its plans.
    whole_tables: BTreeSet<String>,
}

/// Watches the statements of LOMS.
pub(super) struct Plans {
    catalogue: Catalogue,
    /// Where the log is read on.
    read: i64,
    costs: BTreeMap<String, Cost>,
}

impl Plans {
    /// Watches from now on.
    pub(super) async fn start(db: &mut PgConnection) -> Result<Plans> {
        for setting in SETTINGS {
            run(db, setting).await?;
        }
        take_effect(db).await?;
        Ok(Plans {
            catalogue: Catalogue::read()?,
            read: log_size(db).await?,
            costs: BTreeMap::new(),
        })
    }

    /// Waits until a statement has run that only a rare path comes to.
    pub(super) async fn wait_for(
        &mut self,
        db: &mut PgConnection,
        name: &str,
        bound: Duration,
    ) -> Result<()> {
        let by = Instant::now() + bound;
        loop {
            self.look(db).await?;
            if self.costs.contains_key(name) {
                return Ok(());
            }
            if Instant::now() > by {
                bail!("{name} did not run within {bound:?}");
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Ends the watch. An error names the statements of the store that nothing has run: the load is to be taught them.
    pub(super) async fn finish(
        mut self,
        db: &mut PgConnection,
        bound: Duration,
    ) -> Result<Vec<Cost>> {
        let names: Vec<String> = self.catalogue.names().map(str::to_owned).collect();
        let mut missing = Vec::new();
        for name in &names {
            let left = if missing.is_empty() {
                bound
            } else {
                Duration::ZERO
            };
            if self.wait_for(db, name, left).await.is_err() {
                missing.push(name.as_str());
            }
        }
        for reset in RESETS {
            run(db, reset).await?;
        }
        take_effect(db).await?;
        if !missing.is_empty() {
            bail!("nothing has run {}", missing.join(", "));
        }
        Ok(names
            .iter()
            .filter_map(|name| self.costs.remove(name))
            .collect())
    }

    async fn look(&mut self, db: &mut PgConnection) -> Result<()> {
        let size = log_size(db).await?;
        let new: Vec<u8> = sqlx::query_scalar("SELECT pg_read_binary_file($1, $2, $3)")
            .bind(LOG)
            .bind(self.read)
            .bind(size - self.read)
            .fetch_one(db)
            .await?;
        // what is written at this moment is read the next time
        let whole = new.iter().rposition(|byte| *byte == b'\n');
        let whole = &new[..whole.map_or(0, |end| end + 1)];
        let text = String::from_utf8_lossy(whole);
        let taken = self.take(&text)?;
        self.read += taken as i64;
        Ok(())
    }

    /// Takes the entries that are whole; returns how much of the text that was.
    fn take(&mut self, text: &str) -> Result<usize> {
        let mut taken = 0;
        let mut lines = text.split_inclusive('\n').peekable();
        while let Some(line) = lines.next() {
            let mut json = String::new();
            let mut length = line.len();
            // the lines after the first of an entry begin with a tab
            while let Some(more) = lines.next_if(|line| line.starts_with('\t')) {
                json.push_str(more);
                length += more.len();
            }
            if let Some(ms) = duration_of_a_plan(line) {
                // its end is in the next piece
                if lines.peek().is_none() && serde_json::from_str::<Value>(&json).is_err() {
                    return Ok(taken);
                }
                let plan = serde_json::from_str(&json).context("read a plan")?;
                self.note(ms, &plan)?;
            }
            taken += length;
        }
        Ok(taken)
    }

    fn note(&mut self, ms: f64, entry: &Value) -> Result<()> {
        let text = entry["Query Text"]
            .as_str()
            .context("a plan without text")?;
        let Some(name) = self.catalogue.named(text) else {
            return Ok(());
        };
        let cost = self.costs.entry(name.to_owned()).or_insert_with(|| Cost {
            name: name.to_owned(),
            ..Cost::default()
        });
        let plan = &entry["Plan"];
        let (hit, read) = pages(plan);
        cost.times += 1;
        let times = cost.times as f64;
        let add = |mean: &mut f64, value: f64| *mean += (value - *mean) / times;
        add(&mut cost.mean_ms, ms);
        add(
            &mut cost.rows,
            plan["Actual Rows"].as_f64().unwrap_or_default(),
        );
        add(&mut cost.pages_in_memory, hit as f64);
        add(&mut cost.pages_read, read as f64);
        cost.max_ms = cost.max_ms.max(ms);
        cost.max_pages_read = cost.max_pages_read.max(read);
        walk(plan, &mut |node| {
            let text = |key: &str| node[key].as_str().map(str::to_owned);
            let whole = text("Node Type").is_some_and(|kind| kind.ends_with("Seq Scan"));
            if whole {
                cost.whole_tables.extend(text("Relation Name"));
            }
            cost.indexes.extend(text("Index Name"));
        });
        Ok(())
    }
}

async fn log_size(db: &mut PgConnection) -> Result<i64> {
    let size = sqlx::query_scalar("SELECT size FROM pg_stat_file($1)");
    size.bind(LOG)
        .fetch_one(db)
        .await
        .context("look at PostgreSQL's log (devstack's own has it where it is looked for)")
}

/// The milliseconds of a line that a plan follows.
fn duration_of_a_plan(line: &str) -> Option<f64> {
    let (_, said) = line.split_once("LOG:  duration: ")?;
    said.trim_end().strip_suffix(" ms  plan:")?.parse().ok()
}

/// Pages found in memory and read, by the whole statement. What a WITH clause writes and nobody reads is done after the
/// main plan has ended, which therefore does not count it.
fn pages(plan: &Value) -> (u64, u64) {
    let mut read_back = BTreeSet::new();
    walk(plan, &mut |node| {
        read_back.extend(node["CTE Name"].as_str().map(|name| format!("CTE {name}")));
    });
    let children = plan["Plans"].as_array().map_or(&[][..], Vec::as_slice);
    let apart = children.iter().filter(|child| {
        let name = child["Subplan Name"].as_str().unwrap_or_default();
        child["Node Type"] == "ModifyTable" && !read_back.contains(name)
    });
    let own = |node: &Value| {
        let count = |key: &str| node[key].as_u64().unwrap_or_default();
        (count("Shared Hit Blocks"), count("Shared Read Blocks"))
    };
    apart
        .map(own)
        .fold(own(plan), |(hit, read), (more, again)| {
            (hit + more, read + again)
        })
}

fn walk(node: &Value, visit: &mut impl FnMut(&Value)) {
    visit(node);
    for child in node["Plans"].as_array().into_iter().flatten() {
        walk(child, visit);
    }
}

/// For people, and for a page.
pub(super) fn table(costs: &[Cost]) -> String {
    let mut text =
        "| statement | times | ms, mean | ms, most | rows | pages in memory | read | read, most | by index | whole tables |\n\
                    |---|---|---|---|---|---|---|---|---|---|\n"
            .to_owned();
    let list = |names: &BTreeSet<String>| names.iter().cloned().collect::<Vec<_>>().join(", ");
    for cost in costs {
        let _ = writeln!(
            text,
            "| {} | {} | {:.3} | {:.2} | {:.1} | {:.1} | {:.2} | {} | {} | {} |",
            cost.name,
            cost.times,
            cost.mean_ms,
            cost.max_ms,
            cost.rows,
            cost.pages_in_memory,
            cost.pages_read,
            cost.max_pages_read,
            list(&cost.indexes),
            list(&cost.whole_tables)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_counts_once_it_is_whole_and_with_what_its_clauses_wrote() {
        let text = "SELECT content_hash FROM loms.delivery WHERE id = $1";
        let plan = serde_json::json!({"Query Text": text, "Plan": {
            "Node Type": "Index Scan", "Index Name": "delivery_pkey", "Actual Rows": 1,
            "Shared Hit Blocks": 2, "Shared Read Blocks": 1,
            "Plans": [
                {"Node Type": "ModifyTable", "Subplan Name": "CTE kept", "Shared Hit Blocks": 5, "Shared Read Blocks": 3},
                {"Node Type": "ModifyTable", "Subplan Name": "CTE seen", "Shared Hit Blocks": 2, "Shared Read Blocks": 1},
                {"Node Type": "CTE Scan", "CTE Name": "seen"},
                {"Node Type": "Seq Scan", "Relation Name": "delivery"},
            ],
        }});
        let json = serde_json::to_string_pretty(&plan).unwrap();
        let entry = format!(
            "12:00 UTC [7] LOG:  checkpoint complete\n12:00 UTC [7] LOG:  duration: 0.5 ms  plan:\n\t{}\n",
            json.replace('\n', "\n\t")
        );
        let mut plans = Plans {
            catalogue: Catalogue::read().unwrap(),
            read: 0,
            costs: BTreeMap::new(),
        };
        let half = &entry[..entry.find("\t  \"Plan\"").unwrap()];
        let first = half.find('\n').unwrap() + 1;
        assert_eq!(plans.take(half).unwrap(), first);
        assert!(plans.costs.is_empty());
        assert_eq!(plans.take(&entry[first..]).unwrap(), entry.len() - first);
        let cost = &plans.costs["stock::read_delivery_hash"];
        assert_eq!((cost.times, cost.max_pages_read), (1, 4));
        assert!((cost.pages_in_memory - 7.0).abs() < 1e-9);
        assert!(cost.indexes.contains("delivery_pkey") && cost.whole_tables.contains("delivery"));
    }
}
