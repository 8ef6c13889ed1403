//! Owns nginx as a source: one process that sends a file as the kernel has it, or encrypted.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::{Host, Tool, folder_of, missing_of, name_of};
use crate::proc::{self, Running};

/// Files that curl fetches at once, of a folder.
const AT_ONCE: &str = "16";

/// nginx and curl.
#[derive(Default)]
pub(crate) struct Curl {
    tls: bool,
    served: Served,
}

/// nginx, and aria2 with several connections to it.
#[derive(Default)]
pub(crate) struct Aria2 {
    served: Served,
}

/// What is served, and at which address.
#[derive(Default)]
struct Served {
    what: PathBuf,
    url: String,
    certificate: PathBuf,
}

impl Curl {
    pub(crate) fn http() -> Self {
        Self::default()
    }

    pub(crate) fn https() -> Self {
        Self { tls: true, ..Self::default() }
    }
}

impl Tool for Curl {
    fn name(&self) -> &'static str {
        if self.tls { "nginx + curl, HTTPS" } else { "nginx + curl, HTTP" }
    }

    fn missing(&self) -> Option<&'static str> {
        missing_of(&["nginx", "curl", "openssl"])
    }

    fn serve(&mut self, at: &Host, what: &Path) -> Result<Running> {
        let (served, nginx) = Served::start(at, what, self.tls)?;
        self.served = served;
        Ok(nginx)
    }

    fn fetch(&self, at: &Host, into: &Path, _: Option<&Path>) -> Result<Command> {
        let Served { what, url, certificate } = &self.served;
        let mut curl = at.command("curl")?;
        curl.args(["--silent", "--show-error", "--fail", "--noproxy", "*", "--cacert"]);
        curl.arg(certificate);
        let to = into.join(name_of(what)?);
        if what.is_dir() {
            let list = at.home.join("list");
            let mut file = File::create(&list)?;
            for path in files_under(what)? {
                let path = path.strip_prefix(what)?;
                writeln!(file, "url={url}/{}", path.display())?;
                writeln!(file, "output={}", to.join(path).display())?;
            }
            curl.args(["--parallel", "--parallel-max", AT_ONCE, "--create-dirs", "--config"]);
            curl.arg(list);
        } else {
            curl.arg(url).arg("--output").arg(to);
        }
        Ok(curl)
    }
}

impl Tool for Aria2 {
    fn name(&self) -> &'static str {
        "nginx + aria2, 16 × HTTP"
    }

    fn missing(&self) -> Option<&'static str> {
        missing_of(&["nginx", "aria2c", "openssl"])
    }

    fn serve(&mut self, at: &Host, what: &Path) -> Result<Running> {
        let (served, nginx) = Served::start(at, what, false)?;
        self.served = served;
        Ok(nginx)
    }

    fn fetch(&self, at: &Host, into: &Path, _: Option<&Path>) -> Result<Command> {
        let mut aria2 = at.command("aria2c")?;
        aria2.args(["--no-conf", "--quiet", "--max-connection-per-server=16", "--split=16"]);
        aria2.args(["--min-split-size=1M", "--file-allocation=none", "--dir"]).arg(into);
        aria2.arg(&self.served.url);
        Ok(aria2)
    }
}

impl Served {
    fn start(at: &Host, what: &Path, tls: bool) -> Result<(Self, Running)> {
        let certificate = at.home.join("certificate.pem");
        if tls {
            let mut make = at.command("openssl")?;
            make.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]);
            make.args(["-nodes", "-days", "2", "-subj"]).arg(format!("/CN={}", at.place.address));
            make.arg("-addext").arg(format!("subjectAltName=IP:{}", at.place.address));
            make.arg("-out").arg(&certificate).arg("-keyout").arg(at.home.join("key.pem"));
            proc::output(&mut make)?;
        }
        let config = at.home.join("nginx.conf");
        fs::write(&config, configuration(at, folder_of(what)?, tls))?;
        let mut nginx = at.command("nginx")?;
        nginx.arg("-e").arg(at.home.join("error.log"));
        nginx.arg("-p").arg(&at.home).arg("-c").arg(config);
        let mut nginx = at.start(&mut nginx)?;
        at.wait_until_it_listens(&mut nginx)?;
        let scheme = if tls { "https" } else { "http" };
        let url = format!("{scheme}://{}/{}", at.address(), name_of(what)?);
        Ok((Self { what: what.to_owned(), url, certificate }, nginx))
    }
}

/// One process, in the foreground, that keeps to its folder.
fn configuration(at: &Host, files: &Path, tls: bool) -> String {
    let (dir, files, address) = (at.home.display(), files.display(), at.address());
    let (listen, keys) = if tls {
        let keys = format!(
            "ssl_certificate {dir}/certificate.pem;
    ssl_certificate_key {dir}/key.pem;
    ssl_protocols TLSv1.3;
    ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;"
        );
        (format!("{address} ssl"), keys)
    } else {
        (address.to_string(), String::new())
    };
    format!(
        "daemon off;
master_process off;
pid {dir}/pid;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  sendfile on;
  keepalive_requests 1000000;
  default_type application/octet-stream;
  client_body_temp_path {dir}/body;
  proxy_temp_path {dir}/proxy;
  fastcgi_temp_path {dir}/fastcgi;
  uwsgi_temp_path {dir}/uwsgi;
  scgi_temp_path {dir}/scgi;
  server {{
    listen {listen};
    {keys}
    root {files};
  }}
}}
"
    )
}

/// All files in a folder and those in it.
fn files_under(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = vec![];
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()? {
            kind if kind.is_dir() => files.extend(files_under(&entry.path())?),
            kind if kind.is_file() => files.push(entry.path()),
            _ => {}
        }
    }
    Ok(files)
}
