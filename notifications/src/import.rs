//! `notifications import`: the messages of the system before. They were told, and are not told
//! again.

use std::{collections::BTreeMap, fmt};

use anyhow::Context as _;
use fail::fail_point;
use platform::{
    import::{self, Import, ImportArgs, Moment, Original, Source, Table},
    pg::Db,
};
use time::OffsetDateTime;

use crate::{
    app::{MIGRATOR, SERVICE},
    config::Config,
    event::{OrderId, Status, UserId},
    store::{import as store, online::ONLINE},
};

/// The table of the system before.
pub static ORIGINAL: Original = Original {
    service: SERVICE,
    tables: &[Table {
        name: "message",
        columns: &[
            "id",
            "user_id",
            "order_id",
            "status",
            "message",
            "created_date",
        ],
        optional: &[],
        key: "id",
    }],
};

/// Rows that are named one by one; of more the number is enough.
const LISTED: usize = 20;

/// Takes the messages of the system before over, or says what would become of them. Returns what to
/// print.
///
/// # Errors
/// Everything that an operator must settle first, on one line; a database that is away.
pub async fn import(config: &Config, args: &ImportArgs) -> anyhow::Result<String> {
    #[cfg(feature = "failpoints")]
    let _crash_points = fail::FailScenario::setup();
    let schema = (&MIGRATOR, &ONLINE[..]);
    let messages = Messages::default();
    import::run(args, &config.postgres, &ORIGINAL, schema, messages).await
}

/// A message as the system before has it.
#[derive(Clone, Debug)]
pub struct OldMessage {
    /// Its number.
    pub id: i64,
    /// Whom it was told.
    pub user: i64,
    /// Of which order.
    pub order: i64,
    /// What the order had become.
    pub status: String,
    /// The words.
    pub message: String,
    /// When it was told.
    pub at: Option<OffsetDateTime>,
}

impl OldMessage {
    /// Nobody can ask for the messages of such a user, and no order has such a number.
    fn is_nobodys(&self) -> bool {
        UserId::new(self.user).is_none() || OrderId::new(self.order).is_none()
    }

    /// Why it cannot be taken over.
    fn wrong(&self) -> Option<String> {
        let mut known = Status::ALL.iter();
        if !known.any(|status| status.as_str() == self.status) {
            return Some(format!(
                "message {} has the status {:?}",
                self.id, self.status
            ));
        }
        let wrong = self.at.is_none();
        wrong.then(|| format!("message {} has no time", self.id))
    }
}

#[derive(Default)]
struct Messages {
    /// Messages by status.
    statuses: BTreeMap<String, u64>,
    nobodys: u64,
    /// The first and the last time.
    times: Option<(OffsetDateTime, OffsetDateTime)>,
    highest: i64,
    /// Of which database.
    source: String,
    refused: Vec<String>,
    more_refused: u64,
}

impl fmt::Display for Messages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let messages: u64 = self.statuses.values().sum();
        write!(
            f,
            "messages: {messages}, told already; the highest number given is {}",
            self.highest
        )?;
        for (status, messages) in &self.statuses {
            write!(f, "\n  {status}: {messages}")?;
        }
        if let Some((first, last)) = self.times {
            write!(f, "\n  from {first} to {last}")?;
        }
        if self.nobodys > 0 {
            let nobodys = self.nobodys;
            write!(f, "\n  {nobodys} of users or orders below 1 are left out")?;
        }
        Ok(())
    }
}

impl Import for Messages {
    type Batch = Vec<OldMessage>;

    async fn read(
        &self,
        source: &mut Source,
        after: Option<i64>,
    ) -> anyhow::Result<Option<Vec<OldMessage>>> {
        let batch = store::read_messages(source, after).await;
        let batch = batch.context("reading messages")?;
        Ok((!batch.is_empty()).then_some(batch))
    }

    fn last(&self, batch: &Vec<OldMessage>) -> i64 {
        batch.last().map_or(i64::MAX, |message| message.id)
    }

    fn note(&mut self, batch: &Vec<OldMessage>) {
        for message in batch {
            if message.is_nobodys() {
                self.nobodys += 1;
                continue;
            }
            match message.wrong() {
                Some(why) if self.refused.len() < LISTED => self.refused.push(why),
                Some(_) => self.more_refused += 1,
                None => *self.statuses.entry(message.status.clone()).or_default() += 1,
            }
            if let Some(at) = message.at {
                let (first, last) = self.times.unwrap_or((at, at));
                self.times = Some((first.min(at), last.max(at)));
            }
        }
    }

    async fn read_rest(&mut self, source: &mut Source) -> anyhow::Result<()> {
        self.highest = source.highest("message", "id").await?;
        self.source = format!("import:{}", source.name());
        Ok(())
    }

    fn refused(&self) -> Vec<String> {
        let more = (self.more_refused > 0).then(|| format!("and {} more", self.more_refused));
        self.refused.iter().cloned().chain(more).collect()
    }

    fn report(&self) -> String {
        self.to_string()
    }

    async fn begin(&self, db: &mut Db) -> anyhow::Result<Option<String>> {
        if store::has_messages(db).await? {
            return Ok(Some("notifications.message has rows".to_owned()));
        }
        store::raise_message_numbers(db, self.highest).await?;
        Ok(None)
    }

    async fn write(&self, db: &mut Db, batch: &Vec<OldMessage>) -> anyhow::Result<()> {
        let messages = batch.iter().filter(|message| !message.is_nobodys());
        let messages: Vec<&OldMessage> = messages.collect();
        Ok(store::insert_messages(db, &self.source, &messages).await?)
    }

    async fn finish(&self, db: &mut Db) -> anyhow::Result<()> {
        Ok(store::analyze(db).await?)
    }

    fn pass(&self, moment: Moment) {
        match moment {
            Moment::Writing => fail_point!("slice-importing", |_| std::process::abort()),
            Moment::Written => fail_point!("slice-imported", |_| std::process::abort()),
        }
    }
}
