//! Takes over what the system before left in its tables, in slices of one transaction each: read from one database, decided
//! by the service, written to its schema. Killed anywhere, the next run goes on behind the last slice that was committed. The
//! source is never written to.

mod source;
mod state;

use std::{future::Future, io::IsTerminal as _, time::Duration};

use anyhow::Context as _;
use clap::Args;
use secrecy::SecretString;
use sqlx::migrate::Migrator;

pub use self::source::Source;
pub(crate) use self::state::{Found, look};
use crate::{
    command::{self, Access, Unavailable, WaitArgs},
    config::PostgresConfig,
    error::StartError,
    migrate::{self, Online},
    pg::{self, Db, Failure},
};

/// What the system before of a service has.
pub struct Original {
    /// The service, and the schema that its tables are taken to.
    pub service: &'static str,
    pub tables: &'static [Table],
}

/// A table of the system before, in `public`. By its columns' names it is told from a stranger's; types may differ.
pub struct Table {
    pub name: &'static str,
    pub columns: &'static [&'static str],
    /// Columns that it may have besides.
    pub optional: &'static [&'static str],
    /// The number that grows.
    pub key: &'static str,
}

impl Table {
    fn has_the_columns(&self, found: &[String]) -> bool {
        let has = |column: &&str| found.iter().any(|found| found == column);
        let knows = |found: &String| {
            let mut known = self.columns.iter().chain(self.optional);
            known.any(|column| column == found)
        };
        self.columns.iter().all(has) && found.iter().all(knows)
    }
}

/// The arguments of `import`.
#[derive(Args, Clone, Debug)]
pub struct ImportArgs {
    /// The database of the system before [default: the service's own]
    #[arg(long, value_name = "URL")]
    pub from: Option<String>,
    /// Say what becomes of what, and change nothing
    #[arg(long, conflicts_with = "decline")]
    pub dry_run: bool,
    /// Leave the data of the system before where it is: `migrate` and `serve` do without it from now on
    #[arg(long, conflicts_with = "from")]
    pub decline: bool,
    /// The zone of times that the system before stored without one
    #[arg(long, value_name = "ZONE", default_value = "UTC")]
    pub time_zone: String,
    /// Rows of the largest table's parent that one transaction takes over
    #[arg(long, hide = true, default_value_t = 20_000)]
    pub slice: i64,
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// Where a run may be killed by a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// A slice is written, not committed.
    Writing,
    /// A slice is committed.
    Written,
}

/// What a service makes of its source. All of it is read and noted before anything is written, so that the first slice is
/// written only if the last one can be.
pub trait Import {
    /// Rows that belong together.
    type Batch: Send;

    /// The next rows, those with ids above `after`; none behind the last.
    fn read(
        &self,
        source: &mut Source,
        after: Option<i64>,
    ) -> impl Future<Output = anyhow::Result<Option<Self::Batch>>> + Send;

    /// The highest id in it.
    fn last(&self, batch: &Self::Batch) -> i64;

    /// Takes it into account: for the report, and for what the last transaction writes.
    fn note(&mut self, batch: &Self::Batch);

    /// What is read at once, after all batches.
    fn read_rest(&mut self, source: &mut Source)
    -> impl Future<Output = anyhow::Result<()>> + Send;

    /// Rows that cannot be taken over, for an operator to mend; empty if there are none.
    fn refused(&self) -> Vec<String>;

    /// What becomes of what.
    fn report(&self) -> String;

    /// In the first transaction: numbers that the system before has given are not given again. What was there before is in the
    /// way, and is returned.
    fn begin(&self, db: &mut Db) -> impl Future<Output = anyhow::Result<Option<String>>> + Send;

    /// A slice's transaction.
    fn write(
        &self,
        db: &mut Db,
        batch: &Self::Batch,
    ) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// The last transaction.
    fn finish(&self, db: &mut Db) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// A crash point.
    fn pass(&self, _moment: Moment) {}
}

/// Ends with [`StartError`] if a database holds what the system before left, or an import that is not done; one that is away
/// is waited for.
///
/// # Errors
/// [`StartError`], or a database that stays away.
pub async fn refuse_unsettled(
    config: &PostgresConfig,
    original: &Original,
    wait: Duration,
) -> anyhow::Result<()> {
    let mut db = command::connect_within(config, original.service, Access::Read, wait).await?;
    let found = look(&mut db, original).await;
    sqlx::Connection::close(db).await.ok();
    Ok(found?.refuse(original)?)
}

/// `import`: returns what to print last.
///
/// # Errors
/// [`StartError`] for everything that the operator must settle first; [`Unavailable`] for a database that is away.
pub async fn run(
    args: &ImportArgs,
    config: &PostgresConfig,
    original: &Original,
    schema: (&'static Migrator, &[Online]),
    import: impl Import,
) -> anyhow::Result<String> {
    let done = match args {
        ImportArgs { decline: true, .. } => decline(args, config, original, schema).await,
        ImportArgs { dry_run: true, .. } => dry_run(args, config, original, import).await,
        _ => take_over(args, config, original, schema, import).await,
    };
    done.map_err(explain)
}

/// An outage is nobody's fault.
fn explain(error: anyhow::Error) -> anyhow::Error {
    let mut causes = error.chain();
    let failure = causes.find_map(|cause| match cause.downcast_ref::<pg::Error>() {
        Some(error) => Some(error.failure()),
        None => cause.downcast_ref().map(Failure::of),
    });
    match failure {
        Some(failure) if failure.is_outage() => {
            Unavailable::new(format!("{error:#} (run again, it goes on where it was)")).into()
        }
        _ => error,
    }
}

async fn open(
    args: &ImportArgs,
    config: &PostgresConfig,
    original: &Original,
) -> anyhow::Result<Source> {
    let from = match &args.from {
        Some(url) => PostgresConfig {
            connection_string: SecretString::from(url.clone()),
            ..config.clone()
        },
        None => config.clone(),
    };
    if args.from.is_some() {
        pg::connect_options(&from, "import")
            .map_err(|error| StartError::new("--from", error.to_string()))?;
    }
    command::wait_for_database(&from, "import", Access::Read, args.wait.wait).await?;
    Source::open(&from, original, args).await
}

async fn dry_run(
    args: &ImportArgs,
    config: &PostgresConfig,
    original: &Original,
    mut import: impl Import,
) -> anyhow::Result<String> {
    let mut source = open(args, config, original).await?;
    plan(&mut import, &mut source).await?;
    println!("from database {}\n{}", source.name(), import.report());
    refuse(&import, &source)?;
    let others = source.others().await?.len();
    Ok(format!(
        "nothing is changed; {others} other sessions are connected to the source, and an import refuses while any is"
    ))
}

async fn take_over(
    args: &ImportArgs,
    config: &PostgresConfig,
    original: &Original,
    (migrator, online): (&'static Migrator, &[Online]),
    mut import: impl Import,
) -> anyhow::Result<String> {
    let service = original.service;
    let mut source = open(args, config, original).await?;
    command::wait_for_database(config, "import", Access::Write, args.wait.wait).await?;
    let mut target = pg::connect_as(config, "import").await?;
    let first: bool = sqlx::query_scalar("SELECT pg_try_advisory_lock($1)")
        .bind(source::LOCK)
        .fetch_one(&mut target)
        .await?;
    if !first {
        return Err(StartError::new("another import is at work", "wait for it").into());
    }
    let row = state::find(&mut target, original).await?;
    let is_done = row.as_ref().is_some_and(state::Row::is_done);
    if !is_done {
        source.alone().await?;
    }
    // before all is read: whatever changes after this is noticed
    let figures = source.figures(original).await?;
    if let Some(row) = row.filter(|row| !row.is_declined()) {
        unchanged(&row, &source, &figures, service)?;
    }
    if is_done {
        return Ok("it had been imported before: nothing changed".to_owned());
    }
    plan(&mut import, &mut source).await?;
    refuse(&import, &source)?;
    migrate::migrate(config, migrator, online, args.wait.wait).await?;
    let after = begin(&import, service, (&mut source, &figures), &mut target).await?;
    // before it takes minutes
    println!("from database {}\n{}", source.name(), import.report());
    carry(&import, original, (&mut source, after), &mut target).await?;
    Ok("imported".to_owned())
}

async fn decline(
    args: &ImportArgs,
    config: &PostgresConfig,
    original: &Original,
    (migrator, online): (&'static Migrator, &[Online]),
) -> anyhow::Result<String> {
    let service = original.service;
    migrate::migrate(config, migrator, online, args.wait.wait).await?;
    let mut db = pg::connect_as(config, "import").await?;
    if state::decline(&mut db, service).await? {
        return Ok("declined: the tables of the system before stay as they are".to_owned());
    }
    let what = format!("schema {service}: an import has begun");
    Err(StartError::new(what, "it can no longer be declined").into())
}

fn refuse(import: &impl Import, source: &Source) -> Result<(), StartError> {
    let refused = import.refused();
    if refused.is_empty() {
        return Ok(());
    }
    let what = format!("database {}: {}", source.name(), refused.join("; "));
    Err(StartError::new(
        what,
        "mend these rows there, then import again",
    ))
}

/// Reads all there is.
async fn plan<I: Import>(import: &mut I, source: &mut Source) -> anyhow::Result<()> {
    let mut after = None;
    while let Some(batch) = import.read(source, after).await? {
        after = Some(import.last(&batch));
        import.note(&batch);
    }
    import.read_rest(source).await
}

/// Writes the first transaction, unless a run before has. What is left are ids above the one that is returned.
async fn begin<I: Import>(
    import: &I,
    service: &str,
    (source, figures): (&mut Source, &str),
    target: &mut Db,
) -> anyhow::Result<Option<i64>> {
    source.alone().await?;
    if let Some(row) = state::read(target, service).await?
        && !row.is_declined()
    {
        return Ok(row.through);
    }
    if state::count_at_work(target, service).await? > 0 {
        let what = format!("{service} is at work on the schema {service}");
        return Err(StartError::new(what, "stop all of its processes, then import again").into());
    }
    let mut tx = target.begin().await?;
    source::unbounded(&mut tx).await?;
    if let Some(there) = import.begin(&mut tx).await? {
        let what = format!("schema {service} is in use: {there}");
        return Err(StartError::new(what, "import into a schema that holds nothing").into());
    }
    state::begin(&mut tx, service, source.name(), figures).await?;
    import.pass(Moment::Writing);
    tx.commit().await?;
    import.pass(Moment::Written);
    Ok(None)
}

/// Writes the slices that are not written yet.
async fn carry<I: Import>(
    import: &I,
    original: &Original,
    (source, mut after): (&mut Source, Option<i64>),
    target: &mut Db,
) -> anyhow::Result<()> {
    let service = original.service;
    let watched = std::io::stderr().is_terminal();
    while let Some(batch) = import.read(source, after).await? {
        source.alone().await?;
        let last = import.last(&batch);
        let mut tx = target.begin().await?;
        source::unbounded(&mut tx).await?;
        import.write(&mut tx, &batch).await?;
        state::advance(&mut tx, service, last).await?;
        import.pass(Moment::Writing);
        tx.commit().await?;
        import.pass(Moment::Written);
        if watched {
            eprintln!("imported up to {last}");
        }
        after = Some(last);
    }
    source.alone().await?;
    let row = state::read(target, service).await?;
    let row = row.context("the import's own row is gone")?;
    let figures = source.figures(original).await?;
    unchanged(&row, source, &figures, service)?;
    let mut tx = target.begin().await?;
    source::unbounded(&mut tx).await?;
    import.finish(&mut tx).await?;
    state::end(&mut tx, service).await?;
    import.pass(Moment::Writing);
    tx.commit().await?;
    import.pass(Moment::Written);
    Ok(())
}

/// # Errors
/// [`StartError`]: it is not what the first slice was read from.
fn unchanged(
    row: &state::Row,
    source: &Source,
    figures: &str,
    service: &str,
) -> Result<(), StartError> {
    let what = if row.source != source.name() {
        format!(
            "the import reads database {}, not {}",
            row.source,
            source.name()
        )
    } else if row.figures != figures {
        let was: Vec<_> = row.figures.split("; ").collect();
        let changed = figures.split("; ").filter(|now| !was.contains(now));
        let changed: Vec<_> = changed.collect();
        format!(
            "database {} has changed since the first slice: {}",
            row.source,
            changed.join("; ")
        )
    } else {
        return Ok(());
    };
    let advice = match row.is_done() {
        true => "the import is done, nothing more is taken over".to_owned(),
        false => {
            format!("stop what writes to it, then DROP SCHEMA {service} CASCADE and import again")
        }
    };
    Err(StartError::new(what, advice))
}
