//! The page of a study for people: one file that fetches nothing.

use std::fmt::Write;

use super::markdown::{NOTES, main_table, tuning_table};
use super::{Sheet, Verdict};
use crate::report::escape;

/// Beside the style of a run's report.
const STYLE: &str = "\
.wide{overflow-x:auto}.wide table{width:auto;min-width:100%}.wide th,.wide td{padding:6px 18px 6px 0;white-space:nowrap;width:auto;overflow-wrap:normal}\
.wide thead th{border-bottom:1px solid var(--soft);white-space:normal;min-width:74px;vertical-align:bottom;font-size:13px}.wide tbody th{color:var(--ink)}\
.wide .free td{white-space:normal}\
.claims{list-style:none;padding:0;margin:0}.claims li{padding:12px 16px;background:var(--panel);margin-top:8px;border-left:4px solid var(--soft)}\
.claims li.shown{border-color:#0a8f6f}.claims li.contradicted{border-color:var(--warn)}\
.claims b{display:block;margin-bottom:2px}.claims p{color:var(--soft);font-size:13px}\
.plot{margin:18px 0}.plot svg{display:block;width:100%;max-width:860px;height:auto}.notes{color:var(--soft);font-size:13px;padding-left:18px;max-width:90ch}";

fn class(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Shown => "shown",
        Verdict::NotShown => "unclear",
        Verdict::Open => "open",
        Verdict::Contradicted => "contradicted",
    }
}

fn table(html: &mut String, class: &str, (header, rows): (Vec<String>, Vec<Vec<String>>)) {
    let _ = write!(html, "<div class=\"wide\"><table class=\"{class}\"><thead><tr>");
    header.iter().for_each(|cell| {
        let _ = write!(html, "<th scope=\"col\">{}</th>", escape(cell));
    });
    html.push_str("</tr></thead><tbody>\n");
    for row in rows {
        html.push_str("<tr>");
        for (at, cell) in row.iter().enumerate() {
            let tag = if at == 0 { "th" } else { "td" };
            let _ = write!(html, "<{tag}>{}</{tag}>", escape(cell));
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</tbody></table></div>\n");
}

/// The page.
pub(super) fn html(sheet: &Sheet<'_>, facts: &[(&str, String)], command: &str, plots: &[(String, String)]) -> String {
    let study = sheet.study;
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>{0}</title>\n<style>{1}{STYLE}</style></head>\n<body><main>\n<header><h1>{0}</h1>\
         <p class=\"lead\">{2}</p></header>\n<section><h2>Verdicts</h2><ul class=\"claims\">\n",
        escape(study.title),
        include_str!("../report/style.css"),
        escape(study.question)
    );
    for claim in &study.claims {
        let finding = sheet.finding(claim);
        let _ = write!(
            html,
            "<li class=\"{}\"><b>{}</b>{}<p>DeepSpeed-MoE {}</p>",
            class(finding.verdict),
            finding.verdict,
            escape(claim.text),
            escape(claim.source)
        );
        finding.numbers.iter().for_each(|numbers| {
            let _ = write!(html, "<p>{}</p>", escape(numbers));
        });
        html.push_str("</li>\n");
    }
    html.push_str("</ul></section>\n<section><h2>Table</h2>\n");
    table(&mut html, "", main_table(sheet));
    html.push_str("</section>\n<section><h2>Plots</h2>\n");
    for (_, svg) in plots {
        let _ = writeln!(html, "<figure class=\"plot\">{svg}</figure>");
    }
    html.push_str("</section>\n");
    if !sheet.tunings.is_empty() {
        html.push_str("<section><h2>Tuning</h2>\n");
        table(&mut html, "free", tuning_table(sheet));
        html.push_str("</section>\n");
    }
    html.push_str("<section><h2>How</h2><table><tbody>\n");
    for (name, value) in facts {
        let _ = writeln!(html, "<tr><th scope=\"row\">{}</th><td>{}</td></tr>", escape(name), escape(value));
    }
    html.push_str("</tbody></table>\n<ul class=\"notes\">");
    NOTES.iter().for_each(|note| {
        let _ = write!(html, "<li>{}</li>", escape(note));
    });
    let _ = write!(
        html,
        "</ul></section>\n<section><h2>Command</h2><pre>{}</pre></section>\n</main></body></html>\n",
        escape(command)
    );
    html
}
