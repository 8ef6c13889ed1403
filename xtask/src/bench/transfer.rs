//! Owns the measurement of one transfer over loopback: one source, one fetcher, until the file is
//! there under its final name. Each copy is compared with what was sent.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use potluck::control::Event;

use super::{Runs, Setting, check, make_up};
use crate::proc::{self, Machine, Running, measure};
use crate::table::Table;

/// How long nginx may take to listen, in steps of 10 ms.
const STEPS: u32 = 500;

pub(super) fn run(setting: &Setting) -> Result<()> {
    let (potluck, dir) = (&setting.potluck, &setting.dir);
    let (_index, invite) = Machine::index(potluck, dir, None)?;
    let source = Machine::peer(potluck, dir, "source", &invite)?;
    let fetcher = Machine::peer(potluck, dir, "fetcher", &invite)?;
    let file = source.home.join("file");
    let hash = make_up(&file, setting.size)?;
    let shared = source.asks([&"share".into(), &file])?;
    let Event::Shared { id, .. } = shared else { bail!("share said {shared:?}") };
    let web = Web::start(dir, &source.home)?;

    let (mut ours, mut tls, mut plain) = (Runs::default(), Runs::default(), Runs::default());
    let copy = fetcher.home.join("copy");
    for _ in 0..setting.runs {
        let both = [source.pid(), fetcher.pid()];
        let get = ["get".as_ref(), id.as_ref(), "--output".as_ref(), copy.as_os_str()];
        let (done, cost) = measure(&both, || fetcher.asks(get))?;
        ensure!(matches!(done, Event::Done { .. }), "get said {done:?}");
        ours.0.push(cost);
        check(&copy, hash)?;
        fetcher.asks(["unshare", &id])?;
        fs::remove_file(&copy)?;
        let Ok(web) = &web else { continue };
        for (runs, scheme) in [(&mut tls, "https"), (&mut plain, "http")] {
            let (_, cost) = measure(&[web.nginx.pid()], || web.curl(scheme, &copy))?;
            runs.0.push(cost);
            check(&copy, hash)?;
            fs::remove_file(&copy)?;
        }
    }

    println!("## Transfer: one source, one fetcher, {} MiB over loopback\n", setting.size >> 20);
    let heads = ["", "s", "MB/s", "CPU s source", "CPU s fetcher", "× HTTPS", "× HTTP"];
    let mut table = Table::new(&[&heads[..], &["others busy"]].concat());
    let [name, https, http] = ["potluck get", "nginx + curl, HTTPS", "nginx + curl, HTTP"];
    for (name, runs) in [(name, &ours), (https, &tls), (http, &plain)] {
        let Some(first) = runs.0.first() else {
            let why = web.as_ref().err().map(|missing| format!("{missing} is not installed"));
            table.row([name.to_owned(), why.unwrap_or_default()]);
            continue;
        };
        // A fetcher without a process of its own is a child that came and went.
        let fetches = first.cpu.len() == 2;
        let near = |cost: &proc::Cost| cost.children + if fetches { cost.cpu[1] } else { 0.0 };
        table.row([
            name.to_owned(),
            format!("{:.3}", runs.seconds()),
            format!("{:.0}", runs.rate(setting.size)),
            format!("{:.2}", runs.median(|cost| cost.cpu[0])),
            format!("{:.2}", runs.median(near)),
            format!("{:.2}", tls.seconds() / runs.seconds()),
            format!("{:.2}", plain.seconds() / runs.seconds()),
            runs.others(),
        ]);
    }
    println!(
        "{table}\nPeak RSS: source {:.0} MiB, fetcher {:.0} MiB (page cache is not in it).\n",
        proc::memory(source.pid(), "VmHWM")?,
        proc::memory(fetcher.pid(), "VmHWM")?,
    );
    Ok(())
}

/// An nginx that serves a folder over HTTPS and HTTP, and the curl to fetch from it.
struct Web {
    nginx: Running,
    curl: PathBuf,
    certificate: PathBuf,
    https: u16,
    http: u16,
}

/// A program that is not installed.
type Missing = &'static str;

impl Web {
    /// The outer error ends the measurement; the inner one only this part of it.
    fn start(dir: &Path, files: &Path) -> Result<Result<Self, Missing>> {
        let [nginx, curl, openssl] = ["nginx", "curl", "openssl"].map(|n| proc::find(n).ok_or(n));
        let (nginx, curl, openssl) = match (nginx, curl, openssl) {
            (Ok(nginx), Ok(curl), Ok(openssl)) => (nginx, curl, openssl),
            (Err(missing), ..) | (_, Err(missing), _) | (.., Err(missing)) => {
                return Ok(Err(missing));
            }
        };
        let dir = dir.join("nginx");
        fs::create_dir(&dir)?;
        let certificate = dir.join("certificate.pem");
        let mut make = Command::new(openssl);
        make.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]);
        make.args(["-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]);
        make.args(["-addext", "subjectAltName=IP:127.0.0.1", "-out"]).arg(&certificate);
        proc::output(make.arg("-keyout").arg(dir.join("key.pem")))?;
        // Both are held until both are known, so that they differ.
        let free = [TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?];
        let [https, http] = [free[0].local_addr()?.port(), free[1].local_addr()?.port()];
        drop(free);
        let config = dir.join("nginx.conf");
        fs::write(&config, configuration(&dir, files, https, http))?;
        let mut command = Command::new(nginx);
        command.arg("-e").arg(dir.join("error.log")).arg("-p").arg(&dir).arg("-c").arg(config);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let nginx = Running(command.spawn().context("cannot run nginx")?);
        let listens = |port| TcpStream::connect(("127.0.0.1", port)).is_ok();
        for _ in 0..STEPS {
            if listens(https) && listens(http) {
                return Ok(Ok(Self { nginx, curl, certificate, https, http }));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("nginx does not listen: {}", fs::read_to_string(dir.join("error.log"))?)
    }

    fn curl(&self, scheme: &str, to: &Path) -> Result<()> {
        let port = if scheme == "https" { self.https } else { self.http };
        let mut curl = Command::new(&self.curl);
        curl.args(["--silent", "--show-error", "--fail", "--cacert"]).arg(&self.certificate);
        curl.arg(format!("{scheme}://127.0.0.1:{port}/file")).arg("--output").arg(to);
        proc::output(&mut curl).map(drop)
    }
}

/// One process, in the foreground, that keeps to its folder.
fn configuration(dir: &Path, files: &Path, https: u16, http: u16) -> String {
    let (dir, files) = (dir.display(), files.display());
    format!(
        "daemon off;
master_process off;
pid {dir}/pid;
events {{}}
http {{
  access_log off;
  sendfile on;
  default_type application/octet-stream;
  client_body_temp_path {dir}/body;
  proxy_temp_path {dir}/proxy;
  fastcgi_temp_path {dir}/fastcgi;
  uwsgi_temp_path {dir}/uwsgi;
  scgi_temp_path {dir}/scgi;
  server {{
    listen 127.0.0.1:{http};
    listen 127.0.0.1:{https} ssl;
    ssl_certificate {dir}/certificate.pem;
    ssl_certificate_key {dir}/key.pem;
    ssl_protocols TLSv1.3;
    ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
    root {files};
  }}
}}
"
    )
}
