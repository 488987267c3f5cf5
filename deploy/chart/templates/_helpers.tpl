{{/* Name of all objects: the release, with the name of the chart unless the release contains it. */}}
{{- define "modelcache.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that select the pods. They must not change between versions of the chart. */}}
{{- define "modelcache.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "modelcache.labels" -}}
{{ include "modelcache.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "modelcache.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}

{{- define "modelcache.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "modelcache.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end -}}
{{- end -}}

{{- define "modelcache.tokenSecret" -}}
{{ default (include "modelcache.fullname" .) .Values.token.existingSecret }}
{{- end -}}

{{/* URL of the Service, for Hugging Face clients in any namespace. */}}
{{- define "modelcache.serviceUrl" -}}
{{ empty .Values.tls.existingSecret | ternary "http" "https" }}://{{ include "modelcache.fullname" . -}}
.{{ .Release.Namespace }}.svc:{{ int .Values.service.port }}
{{- end -}}

{{/* The configuration file of the daemon. */}}
{{- define "modelcache.config" -}}
{{- $address := .Values.listenAddress -}}
{{- $settings := deepCopy .Values.settings -}}
{{- $_ := set $settings "dir" "/cache" -}}
{{- $_ := set $settings "max_bytes" .Values.cache.maxBytes -}}
{{- $_ := set $settings "min_free_bytes" .Values.cache.minFreeBytes -}}
{{- $_ := set $settings "listen" (printf "%s:%d" $address (int .Values.ports.http)) -}}
{{- $_ := set $settings "admin_listen" (printf "%s:%d" $address (int .Values.ports.admin)) -}}
{{- with .Values.prewarm -}}
{{- $_ := set $settings "prewarm" . -}}
{{- end -}}
{{- if .Values.tls.existingSecret -}}
{{- $_ := set $settings "tls_certificate" "/etc/modelcache-tls/tls.crt" -}}
{{- $_ := set $settings "tls_key" "/etc/modelcache-tls/tls.key" -}}
{{- end -}}
{{ toToml $settings }}
{{- end -}}

{{/* Stops with an explanation if values contradict each other. The schema checks each value alone. */}}
{{- define "modelcache.check" -}}
{{- $free := .Values.cache.minFreeBytes -}}
{{- if and .Values.cache.onNodeFilesystem (hasSuffix "%" $free) (le (trimSuffix "%" $free | int) 15) -}}
{{- fail (print "cache.minFreeBytes is " $free ", but by default the kubelet evicts pods when less than 15% of the "
  "node's filesystem is free: set it to 20% or more, or set cache.onNodeFilesystem to false if cache.hostPath is on a "
  "disk of its own") -}}
{{- end -}}
{{- range .Values.prewarm -}}
{{- if not (regexMatch "^[^ ,]+@[^ ,]+$|^[a-z0-9]+:/[^ ,]+$" .) -}}
{{- fail (printf "prewarm has %q, which is no reference: write hf://org/model@revision, or NAME@VERSION" .) -}}
{{- end -}}
{{- end -}}
{{- if eq (int .Values.ports.http) (int .Values.ports.admin) -}}
{{- fail (printf "ports.http and ports.admin are both %d: use two ports" (int .Values.ports.http)) -}}
{{- end -}}
{{- $kserve := .Values.kserve.storageContainer -}}
{{- if and $kserve.enabled $kserve.throughDaemon (not .Values.service.enabled) -}}
{{- fail "kserve.storageContainer.throughDaemon needs service.enabled: set one of them to the value of the other" -}}
{{- end -}}
{{- end -}}
