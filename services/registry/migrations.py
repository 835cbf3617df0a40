"""The registry's tables. A migration that was released is never edited: another follows it."""

MIGRATIONS = (
    """
    create table pipeline (
        project text not null,
        pipeline text not null,
        revision int not null default 0,
        primary key (project, pipeline)
    );
    create table pipeline_revision (
        project text not null,
        pipeline text not null,
        revision int not null,
        model text not null,
        spec jsonb not null,
        applied_at timestamptz not null default now(),
        primary key (project, pipeline, revision),
        foreign key (project, pipeline) references pipeline
    );
    create table model (
        project text not null,
        model text not null,
        pipeline text not null,
        versions int not null default 0,
        primary key (project, model)
    );
    create table model_version (
        project text not null,
        model text not null,
        number int not null,
        digest text not null,
        job text not null,
        manifest jsonb not null,
        traceparent text not null,
        registered_at timestamptz not null default now(),
        state text not null
            check (state in ('registered', 'rejected', 'canary', 'serving', 'retired')),
        primary key (project, model, number),
        unique (project, job),
        foreign key (project, model) references model
    );
    create function refuse_change() returns trigger language plpgsql as $$
    begin
        raise exception 'model version %/%/% is immutable', old.project, old.model, old.number;
    end $$;
    create trigger immutable
        before delete or update of
            project, model, number, digest, job, manifest, traceparent, registered_at
        on model_version for each row execute function refuse_change();
    create table alias (
        project text not null,
        model text not null,
        alias text not null,
        number int not null,
        primary key (project, model, alias),
        foreign key (project, model, number) references model_version
    );
    create table evaluation (
        project text not null,
        model text not null,
        number int not null,
        evaluation jsonb not null,
        passed boolean not null,
        checks jsonb not null,
        primary key (project, model, number),
        foreign key (project, model, number) references model_version
    );
    create table deployment (
        project text not null,
        model text not null,
        state text not null,
        generation int not null,
        champion int not null,
        canary int,
        settings jsonb not null,
        ready_generation int not null default 0,
        primary key (project, model),
        foreign key (project, model, champion) references model_version,
        foreign key (project, model, canary) references model_version
    );
    create table observation (
        project text not null,
        model text not null,
        generation int not null,
        replica text not null,
        number int not null,
        requests bigint not null,
        errors bigint not null,
        labelled bigint not null,
        correct bigint not null,
        primary key (project, model, generation, replica, number)
    );
    create table failed_job (
        project text not null,
        job text not null,
        reason text not null,
        attempt int not null,
        at timestamptz not null default now(),
        primary key (project, job)
    );
    """,
)
