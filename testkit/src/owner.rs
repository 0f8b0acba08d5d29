//! The users that services run as, `checkout`, `loms` and `notifications` in the files of examples: each owns its database
//! and may do nothing else on the server. A superuser in their place would hide what production meets.

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};
use sqlx::{AssertSqlSafe, PgConnection};

/// Makes a database for `owner`, empty or a copy, and the user if he is not there; of one who is there nothing is changed.
/// The names are of our own making: letters, digits and underscores.
///
/// # Errors
/// What PostgreSQL said, or that the user who is there may do more than owners may.
pub async fn create_database(
    admin: &mut PgConnection,
    admin_url: &str,
    name: &str,
    owner: &str,
    template: Option<&str>,
) -> Result<()> {
    let template = template.map_or_else(String::new, |name| format!(" TEMPLATE {name}"));
    let create = format!("CREATE DATABASE {name} OWNER {owner}{template}");
    for attempt in 1.. {
        create_owner(admin, admin_url, owner).await?;
        let created = sqlx::query(AssertSqlSafe(&*create))
            .execute(&mut *admin)
            .await;
        match created {
            // a run that ends drops the users that it made, if they own nothing: one of this moment is made again
            Err(error) if is(&error, &["42704"]) && attempt < 10 => {}
            Err(error) => {
                let what = format!("create the database {name} (as a superuser)");
                return Err(error).context(what);
            }
            Ok(_) => break,
        }
    }
    Ok(())
}

async fn create_owner(admin: &mut PgConnection, admin_url: &str, owner: &str) -> Result<()> {
    let attributes = "SELECT rolcanlogin AND NOT (rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls)
                      FROM pg_roles WHERE rolname = $1";
    let plain: Option<bool> = sqlx::query_scalar(attributes)
        .bind(owner)
        .fetch_optional(&mut *admin)
        .await?;
    if let Some(plain) = plain {
        ensure!(
            plain,
            "the user {owner} of this server may do more than own its database"
        );
        return Ok(());
    }
    let password = password(admin_url, owner)?;
    let create = format!(
        "CREATE ROLE {owner} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD '{password}'"
    );
    match sqlx::query(AssertSqlSafe(create)).execute(admin).await {
        // another process has made it since the look: duplicate_object, or unique_violation before it has committed
        Err(error) if !is(&error, &["42710", "23505"]) => {
            Err(error).with_context(|| format!("create the user {owner} (as a superuser)"))
        }
        _ => Ok(()),
    }
}

fn is(error: &sqlx::Error, codes: &[&str]) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.is_some_and(|code| codes.contains(&&*code))
}

/// Drops a database, whoever is still connected to it.
///
/// # Errors
/// What PostgreSQL said.
pub async fn drop_database(admin: &mut PgConnection, name: &str) -> Result<()> {
    let drop = format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)");
    let dropped = sqlx::query(AssertSqlSafe(drop)).execute(admin).await;
    dropped.with_context(|| format!("drop the database {name}"))?;
    Ok(())
}

/// The URL by which `owner` reaches `database` on the server of `admin_url`.
///
/// # Errors
/// A URL that is none.
pub fn owner_url(admin_url: &str, owner: &str, database: &str) -> Result<String> {
    let url = Url::parse(admin_url)?;
    let password = password(admin_url, owner)?;
    Ok(url.with(&format!("{owner}:{password}@"), database))
}

/// The URL of the same user with another database.
///
/// # Errors
/// A URL that is none.
pub fn with_database(admin_url: &str, database: &str) -> Result<String> {
    let url = Url::parse(admin_url)?;
    let user = url.user.map_or_else(String::new, |user| format!("{user}@"));
    Ok(url.with(&user, database))
}

/// All who know the administrator's password know the owners', and nobody else: processes that share a server need not tell
/// each other.
fn password(admin_url: &str, owner: &str) -> Result<String> {
    let user = Url::parse(admin_url)?.user.unwrap_or_default();
    let hash = Sha256::digest(format!("{owner} of {user}"));
    Ok(hash[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// What a URL consists of; `user` has the password.
struct Url<'a> {
    scheme: &'a str,
    user: Option<&'a str>,
    host: &'a str,
    parameters: Option<&'a str>,
}

impl<'a> Url<'a> {
    fn parse(url: &'a str) -> Result<Url<'a>> {
        let (address, parameters) = match url.split_once('?') {
            Some((address, parameters)) => (address, Some(parameters)),
            None => (url, None),
        };
        let parts = address.split_once("://");
        let (scheme, rest) = parts.context("not written as postgres://user:password@host:port")?;
        ensure!(!rest.is_empty(), "a URL without a host");
        let authority = rest.split('/').next().unwrap_or(rest);
        let (user, host) = match authority.rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, authority),
        };
        Ok(Url {
            scheme,
            user,
            host,
            parameters,
        })
    }

    fn with(&self, user: &str, database: &str) -> String {
        let parameters = self
            .parameters
            .map_or_else(String::new, |parameters| format!("?{parameters}"));
        format!(
            "{}://{user}{}/{database}{parameters}",
            self.scheme, self.host
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_database_changes() {
        let same = |url: &str| with_database(url, "mine").unwrap();
        assert_eq!(
            same("postgres://u:p@h:1/postgres"),
            "postgres://u:p@h:1/mine"
        );
        assert_eq!(same("postgres://u@h"), "postgres://u@h/mine");
        assert_eq!(same("postgres://h/x"), "postgres://h/mine");
        assert_eq!(
            same("postgres://u@h/x?sslmode=disable"),
            "postgres://u@h/mine?sslmode=disable"
        );
        assert!(with_database("localhost:5432", "mine").is_err());
    }

    #[test]
    fn owners_of_one_server_have_passwords_that_only_its_administrator_knows() {
        let url = |admin: &str, owner: &str| owner_url(admin, owner, "d").unwrap();
        let loms = url("postgres://u:p@h:1/postgres?sslmode=require", "loms");
        assert!(loms.starts_with("postgres://loms:"), "{loms}");
        assert!(loms.ends_with("@h:1/d?sslmode=require"), "{loms}");
        // whatever database the administrator names
        assert_eq!(
            loms,
            url("postgres://u:p@h:1/other?sslmode=require", "loms")
        );
        let secret = |url: &str| url.split(['/', ':', '@']).nth(4).unwrap().to_owned();
        let other = url("postgres://u:q@h:1/postgres", "loms");
        assert_ne!(secret(&loms), secret(&other));
        let checkout = url("postgres://u:p@h:1/postgres", "checkout");
        assert_ne!(secret(&loms), secret(&checkout));
    }
}
