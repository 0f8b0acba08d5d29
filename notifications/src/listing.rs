//! Shows the dead letters, from their rows and from the topic, each once: a letter has a row until
//! the topic has had it for a week, and the topic has it from soon after it was kept until its
//! retention ends.

use std::collections::HashSet;

use platform::{
    command::{self, Access},
    pg::{self, Database, Db, Pool},
};
use rdkafka::{
    TopicPartitionList,
    consumer::{Consumer as _, StreamConsumer},
    message::OwnedMessage,
    topic_partition_list::Offset,
};

use crate::{
    app::{MIGRATOR, SERVICE},
    config::Config,
    letter::{
        DeadLetter, Identity, identity,
        topic::{BROKER_BOUND, Spans, consumer, next, spans},
    },
    store::dead_letters::{self as store, RowOf},
};

/// Letters read at once.
const PAGE: usize = 100;

/// Letters, and how many there are of them.
#[derive(Default)]
pub struct Listing {
    /// The first: those of the topic, the oldest first, then those that are not there.
    pub letters: Vec<DeadLetter>,
    /// These, and those beyond the limit.
    pub total: usize,
    /// Why the topic was not read.
    pub without_topic: Option<String>,
}

impl Listing {
    fn add(&mut self, letter: DeadLetter, limit: usize) {
        self.total += 1;
        if self.letters.len() < limit {
            self.letters.push(letter);
        }
    }
}

/// Shows at most `limit` of the letters that wait to be put back, or of all that are known. Without
/// the topic, those that have rows.
///
/// # Errors
/// No database answers.
pub async fn list(config: &Config, all: bool, limit: usize) -> anyhow::Result<Listing> {
    let topic = &config.kafka.dead_letter_topic;
    let consumer = consumer(config)?;
    let pool = pool(config).await?;
    let mut listing = Listing::default();
    let mut shown = HashSet::new();
    match spans(&consumer, topic, all) {
        Ok(Some(open)) => {
            let mut reading = Reading {
                consumer,
                pool: pool.clone(),
                seen: HashSet::new(),
                all,
                limit,
            };
            shown = reading.read(topic, open, &mut listing).await?;
        }
        Ok(None) => listing.without_topic = Some(format!("topic {topic} is missing")),
        Err(error) => listing.without_topic = Some(error.to_string()),
    }
    let mut after = 0;
    loop {
        let page = async |db: &mut Db| {
            pg::Result::Ok(store::list_dead_letters(db, all, after, PAGE as i64).await?)
        };
        let page = pool.with_connection(page).await?;
        let Some(last) = page.last() else {
            return Ok(listing);
        };
        after = last.id;
        for letter in page.iter().filter(|letter| !shown.contains(&letter.id)) {
            listing.add(DeadLetter::kept(letter), limit);
        }
    }
}

struct Reading {
    consumer: StreamConsumer,
    pool: Pool,
    seen: HashSet<Identity>,
    all: bool,
    limit: usize,
}

impl Reading {
    /// Answers the rows of the letters that were met.
    async fn read(
        &mut self,
        topic: &str,
        mut open: Spans,
        listing: &mut Listing,
    ) -> anyhow::Result<HashSet<i64>> {
        let mut from = TopicPartitionList::new();
        for (partition, span) in &open {
            from.add_partition_offset(topic, *partition, Offset::Offset(span.start))?;
        }
        self.consumer.assign(&from)?;
        let mut met = HashSet::new();
        let mut records = Vec::with_capacity(PAGE);
        while !open.is_empty() {
            records.extend(next(&self.consumer, &mut open, BROKER_BOUND).await?);
            if records.len() == PAGE || open.is_empty() {
                self.show(&records, &mut met, listing).await?;
                records.clear();
            }
        }
        Ok(met)
    }

    async fn show(
        &mut self,
        records: &[OwnedMessage],
        met: &mut HashSet<i64>,
        listing: &mut Listing,
    ) -> anyhow::Result<()> {
        let rows = rows_of(&self.pool, records).await?;
        for (record, row) in records.iter().zip(rows) {
            let copy = identity(record).is_some_and(|identity| !self.seen.insert(identity));
            let waits = self.all || row.is_none_or(|row| !row.put_back);
            met.extend(row.map(|row| row.id));
            if waits && !copy {
                let row = row.map(|row| row.id);
                let letter = DeadLetter {
                    row,
                    ..DeadLetter::read(record)
                };
                listing.add(letter, self.limit);
            }
        }
        Ok(())
    }
}

/// A connection for one of the commands.
pub(crate) async fn pool(config: &Config) -> anyhow::Result<Pool> {
    const NAME: &str = "notifications-letters";
    command::wait_for_database(&config.postgres, NAME, Access::Write, BROKER_BOUND).await?;
    let database = Database::new(SERVICE, &config.postgres, &MIGRATOR)?;
    Ok(database.pool(NAME, 1))
}

/// The row of each letter, if it has one.
pub(crate) async fn rows_of(
    pool: &Pool,
    records: &[OwnedMessage],
) -> anyhow::Result<Vec<Option<RowOf>>> {
    let mut rows = vec![None; records.len()];
    let known: Vec<(usize, Identity)> = records
        .iter()
        .enumerate()
        .filter_map(|(at, record)| Some((at, identity(record)?)))
        .collect();
    let (places, identities): (Vec<usize>, Vec<Identity>) = known.into_iter().unzip();
    let found = async |db: &mut Db| pg::Result::Ok(store::find_rows(db, &identities).await?);
    for (nth, row) in pool.with_connection(found).await? {
        if let Some(at) = places.get(nth) {
            rows[*at] = Some(row);
        }
    }
    Ok(rows)
}
