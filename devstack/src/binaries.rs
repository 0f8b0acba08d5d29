//! The executables of a run: the services beside devstack's own, built first in the same profile.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use tokio::process::Command;

use crate::failure::Misuse;

/// The three services, in the order in which a purchase meets them.
pub const SERVICES: [&str; 3] = ["checkout", "loms", "notifications"];

/// devstack's executable, and the services beside it.
#[derive(Debug, Clone)]
pub struct Binaries {
    devstack: PathBuf,
    /// Where the services are, if not beside devstack.
    services: Option<PathBuf>,
}

impl Binaries {
    /// The services beside this very executable.
    pub fn beside_me() -> Result<Binaries> {
        Ok(Binaries {
            devstack: std::env::current_exe().context("find devstack's own executable")?,
            services: None,
        })
    }

    /// The services beside `devstack`, for tests, which are executables of their own elsewhere.
    pub fn beside(devstack: impl Into<PathBuf>) -> Binaries {
        Binaries {
            devstack: devstack.into(),
            services: None,
        }
    }

    /// The services of `folder` instead, another release say.
    pub fn with_services(self, folder: impl Into<PathBuf>) -> Binaries {
        Binaries {
            services: Some(folder.into()),
            ..self
        }
    }

    /// devstack's executable.
    pub fn devstack(&self) -> &Path {
        &self.devstack
    }

    /// A service's executable.
    pub fn service(&self, name: &str) -> Result<PathBuf> {
        let path = match &self.services {
            Some(folder) => folder.join(name),
            None => self.devstack.with_file_name(name),
        };
        if !path.exists() {
            let what = format!("{} is not there", path.display());
            return Err(Misuse::error(
                what,
                "leave --no-build out, or run `cargo build --workspace`",
            ));
        }
        Ok(path)
    }

    /// Builds the services into the folder of devstack's executable. The workspace is chosen whole, because cargo would
    /// otherwise choose other features for the crates they share and compile those again.
    pub async fn build(&self) -> Result<()> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
        let profile = self.devstack.parent().context("devstack's folder")?;
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo
            .args(["build", "--quiet", "--workspace", "--manifest-path"])
            .arg(manifest);
        cargo.args(SERVICES.iter().flat_map(|service| ["--bin", service]));
        cargo
            .arg("--target-dir")
            .arg(profile.parent().context("the target folder")?);
        match profile.file_name().and_then(|name| name.to_str()) {
            Some("debug") | None => {}
            Some(name) => {
                cargo.args(["--profile", name]);
            }
        }
        let status = cargo.status().await;
        let status = status.map_err(|error| {
            Misuse::error(
                format!("running cargo: {error}"),
                "install rustup, or use --no-build",
            )
        })?;
        anyhow::ensure!(status.success(), "the services do not build: {status}");
        Ok(())
    }
}
